"""From segments to a batch: text, image codes and feature slots, in any number and order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from mmdlm.core.host_masks import HostMasks, on_host, sent
from mmdlm.core.vocabulary import GENERATED, Modality, Vocabulary

NO_DOCUMENT = -1


class Views(Protocol):
    """One image before a vision adapter has run: what it is made of, and how many slots it fills.

    An adapter of `mmdlm.vision` makes them and turns them into `slots` features; nobody else looks
    inside.
    """

    @property
    def slots(self) -> int:
        """FEATURE slots that the image fills."""
        ...

    @property
    def places(self) -> Tensor | None:
        """[slots, A] int64, steps on each of A axes from where the image begins (`Batch.axes`).

        None: its slots follow one another as text does.
        """
        ...

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the same views with each tensor replaced (moved to a device, pinned)."""
        ...


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one modality; `target` marks the ones a model is to produce.

    Attributes:
        ids: [n] int64.
        target: [n] bool; part of a segment may be target (a hole in the middle).
        features: [n, D], or.
        views: What an adapter makes n features of; FEATURE segments have one of the two.
    """

    modality: Modality
    ids: Tensor
    target: Tensor
    features: Tensor | None = None
    views: Views | None = None

    def __post_init__(self) -> None:
        if self.ids.shape != self.target.shape:
            raise ValueError(
                f"segment: {tuple(self.ids.shape)} ids but {tuple(self.target.shape)} target marks"
            )
        given = (self.features is not None) + (self.views is not None)
        if given != (self.modality == Modality.FEATURE):
            raise ValueError(
                "segment: a FEATURE segment has features or views, one of the two, and no other "
                f"has any; {self.modality.name} was given {given}"
            )
        if self.features is not None and len(self.features) != len(self.ids):
            raise ValueError(f"segment: {len(self.ids)} slots but {len(self.features)} features")
        if self.views is not None and self.views.slots != len(self.ids):
            raise ValueError(
                f"segment: {len(self.ids)} slots but views that fill {self.views.slots}"
            )
        if self.modality not in GENERATED and bool(self.target.any()):
            raise ValueError(f"segment: {self.modality.name} tokens cannot be targets")


def text_segment(ids: Iterable[int] | Tensor, *, target: bool | Tensor = False) -> Segment:
    """Text tokens [n]; `target` for all of them or token by token."""
    return _segment(Modality.TEXT, ids, target)


def image_segments(
    codes: Tensor, vocabulary: Vocabulary, *, target: bool | Tensor = False
) -> tuple[Segment, Segment, Segment]:
    """Codes [K] of one image -> begin marker, its ids, end marker."""
    begin, end = vocabulary.image_markers
    image = _segment(Modality.IMAGE, vocabulary.image_ids(codes.flatten()), target)
    return control_segment(begin), image, control_segment(end)


def control_segment(*ids: int) -> Segment:
    """Structure: always context, never generated, kept when the context is dropped."""
    return _segment(Modality.CONTROL, ids, False)


def feature_segment(features: Tensor, vocabulary: Vocabulary) -> Segment:
    """Slots [n] that carry the features [n, D] of a vision adapter."""
    n = len(features)
    ids = torch.full((n,), vocabulary.pad_id)
    return Segment(Modality.FEATURE, ids, torch.zeros(n, dtype=torch.bool), features=features)


def image_segment(views: Views, vocabulary: Vocabulary) -> Segment:
    """Slots for an image that a vision adapter is yet to look at."""
    ids = torch.full((views.slots,), vocabulary.pad_id)
    return Segment(Modality.FEATURE, ids, torch.zeros_like(ids, dtype=torch.bool), views=views)


def _segment(modality: Modality, ids: Iterable[int] | Tensor, target: bool | Tensor) -> Segment:
    ids = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids), dtype=torch.int64)
    if isinstance(target, bool):
        target = torch.full(ids.shape, target)
    return Segment(modality, ids, target.to(torch.bool))


@dataclass(frozen=True)
class Sequence:
    """One document: segments in reading order.

    Attributes:
        partner: A document that goes where this one goes, and stands behind it in its row without
            seeing it: what it is compared with, such as the answer that was not preferred.
    """

    segments: tuple[Segment, ...]
    partner: Sequence | None = None

    def __len__(self) -> int:
        """Tokens, those of the partner included."""
        own = sum(len(segment.ids) for segment in self.segments)
        return own if self.partner is None else own + len(self.partner)

    @property
    def documents(self) -> tuple[Sequence, ...]:
        """The document by itself, and its partner where it has one."""
        if self.partner is None:
            return (self,)
        return (Sequence(self.segments), *self.partner.documents)


@dataclass(frozen=True)
class Batch:
    """Rows of one or several documents, clean (x_0); everything a task says is in `target`.

    Attributes:
        ids: [B, L] int64.
        modality: [B, L] int64, values of `Modality`; CONTROL at padding.
        target: [B, L] bool.
        document: [B, L] int64, number of the document within its row; -1 at padding.
        segment: [B, L] int64, number of the segment within its row; -1 at padding.
        position: [B, L] int64, counts from 0 in each document.
        features: [F, D] in the order of the FEATURE slots (row by row), or.
        views: Images in that order, whose features are yet to be computed; both None: no slots.
        lookahead: [B] int64, tokens to its right that a token sees, 0 being causal; None: all of
            them.
        axes: [B, L, A] int64, position on each axis of a rotary embedding that has several; None:
            `position` on all of them.
        block: [B, L] int64, number of each token's block in its document (`mmdlm.core.blocks`): a
            token sees blocks up to its own; None: all of its document.
        noisy: [B, L] bool, the noisy copies in a row that holds its clean copy too; None: it does
            not.
    """

    ids: Tensor
    modality: Tensor
    target: Tensor
    document: Tensor
    segment: Tensor
    position: Tensor
    features: Tensor | None = None
    views: tuple[Views, ...] | None = None
    lookahead: Tensor | None = None
    axes: Tensor | None = None
    block: Tensor | None = None
    noisy: Tensor | None = None

    def __post_init__(self) -> None:
        if self.modality.device.type != "cpu":
            return  # checked where it was built; to ask a GPU here would make it wait each time
        slots = int((self.modality == Modality.FEATURE).numpy().sum())
        given = 0 if self.features is None else len(self.features)
        given += sum(image.slots for image in self.views or ())
        if slots != given:
            raise ValueError(
                f"batch: {slots} FEATURE slots but {given} feature rows; every image placeholder "
                "needs its features, and the reverse"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_padding(self) -> Tensor:
        """[B, L] bool."""
        return self.document == NO_DOCUMENT

    @property
    def prefix(self) -> Tensor:
        """[B, L] bool: what stands before the first target of its document, such as a prompt."""
        rows, length = self.document.shape
        place = torch.arange(length, device=self.ids.device).expand(rows, -1)
        number = self.document + 1
        first = torch.full((rows, length + 1), length, device=self.ids.device).scatter_reduce(
            1, number, place.masked_fill(~self.target, length), "amin"
        )
        return place < first.gather(1, number)

    @property
    def host_masks(self) -> HostMasks:
        """Return its masks on the host; the device is asked unless `with_host_masks` kept them."""
        return self._kept or HostMasks.of(
            target=self.target,
            prefix=self.prefix,
            modality=self.modality,
            document=self.document,
        )

    def with_host_masks(self) -> Batch:
        """Return the same batch, which keeps its `host_masks`; so do rows and twins of it."""
        return self._keeping(self.host_masks)

    def _keeping(self, host_masks: HostMasks | None) -> Batch:
        twin = copy(self)
        if host_masks is not None:
            object.__setattr__(twin, "_marks", host_masks)
        return twin

    @property
    def _kept(self) -> HostMasks | None:
        return vars(self).get("_marks")

    def with_blocks(self, block: Tensor) -> Batch:
        """Return the batch with numbers of blocks [B, L]."""
        return replace(self, block=block)._keeping(self._kept)

    def of(self, modality: Modality) -> Tensor:
        """[B, L] bool: positions of one modality."""
        return self.modality == modality

    def only(self, modality: Modality) -> Batch:
        """Return the batch with only tokens of `modality` as targets."""
        return replace(self, target=self.target & self.of(modality))

    def rows(self, index: Tensor) -> Batch:
        """Rows [N] int64 of the batch, in this order and as often as named, with their images."""
        features = views = None
        on_cpu = on_host(index)
        index = sent(on_cpu, self.ids.device)
        if self.features is not None or self.views is not None:
            slots = self.host_masks.of_modality(Modality.FEATURE).sum(1).tolist()
            chosen = on_cpu.tolist()
        if self.features is not None:
            pieces = self.features.split(slots)
            features = torch.cat([pieces[row] for row in chosen])
        if self.views is not None:
            images = iter(self.views)
            of_row: list[tuple[Views, ...]] = []
            for room in slots:
                found: list[Views] = []
                while sum(image.slots for image in found) < room:
                    found.append(next(images))
                of_row.append(tuple(found))
            views = sum((of_row[row] for row in chosen), ())
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        del tensors["features"], tensors["views"]
        taken: dict[str, Any] = {k: v[index] for k, v in tensors.items() if v is not None}
        rows = replace(self, **taken, features=features, views=views)
        return rows if self._kept is None else rows._keeping(self._kept.rows(on_cpu))

    def without_context(self, vocabulary: Vocabulary) -> Batch:
        """Return the unconditional batch of classifier-free guidance: its context is masked.

        Structure (CONTROL) stays, and so do feature slots, whose features become zero.
        Source: arXiv:2410.18514, section 3.3 (the prompt is replaced by mask tokens).
        """
        generated = self.of(Modality.TEXT) | self.of(Modality.IMAGE)
        ids = self.ids.masked_fill(generated & ~self.target, vocabulary.mask_id)
        features = None if self.features is None else torch.zeros_like(self.features)
        return replace(self, ids=ids, features=features)._keeping(self._kept)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch on another device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (the hook that torch's DataLoader calls)."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        views = values.pop("views")
        moved: dict[str, Any] = {k: function(v) for k, v in values.items() if v is not None}
        if views is not None:
            moved["views"] = tuple(image.map(function) for image in views)
        return replace(self, **moved)


def concatenate(batches: Iterable[Batch]) -> Batch:
    """Concatenate the rows of several batches of one length; features keep their order."""
    batches = _on_the_same_axes(list(batches))
    lengths = sorted({batch.ids.shape[1] for batch in batches})
    if len(lengths) != 1:
        raise ValueError(f"concatenate: rows of lengths {lengths}; one length is needed")
    parts = {
        f.name: [getattr(batch, f.name) for batch in batches if getattr(batch, f.name) is not None]
        for f in fields(Batch)
    }
    views = parts.pop("views")
    joined: dict[str, Any] = {name: torch.cat(part) for name, part in parts.items() if part}
    if views and "features" in joined:
        raise ValueError("concatenate: some batches have features and some views; compute all")
    joint = replace(batches[0], **joined, views=sum(views, ()) if views else None)
    kept = [batch._kept for batch in batches if batch._kept is not None]
    return joint._keeping(HostMasks.joined(kept)) if len(kept) == len(batches) else joint


def _on_the_same_axes(batches: list[Batch]) -> list[Batch]:
    """Return the same batches; if one has axes, those without get them."""
    count = max((batch.axes.shape[2] for batch in batches if batch.axes is not None), default=0)
    if not count:
        return batches
    return [
        batch
        if batch.axes is not None
        else replace(batch, axes=batch.position[..., None].expand(-1, -1, count))
        for batch in batches
    ]


def collate(
    sequences: Iterable[Sequence], vocabulary: Vocabulary, *, length: int | None = None
) -> Batch:
    """One sequence a row, padded on the right to `length` (default: the longest)."""
    rows = [[sequence] for sequence in sequences]
    if not rows:
        raise ValueError("collate: no sequences")
    longest = max(len(sequence) for (sequence,) in rows)
    return _lay_out(rows, vocabulary, length=length or longest)


def pack(sequences: Iterable[Sequence], vocabulary: Vocabulary, *, length: int) -> Batch:
    """Several sequences a row, as few rows as first-fit decreasing finds.

    Documents of a row do not see each other, and positions restart, so that a packed sequence gets
    the logits that it has by itself; partners stay together. Raises ValueError where a sequence is
    longer than `length`.
    """
    return _lay_out(arrange(sequences, length=length), vocabulary, length=length)


def arrange(sequences: Iterable[Sequence], *, length: int) -> list[list[Sequence]]:
    """Return the sequences of each row, as few rows as first-fit decreasing finds."""
    rows: list[list[Sequence]] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        row = next((i for i, free in enumerate(room) if free >= len(sequence)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(sequence)
        room[row] -= len(sequence)
    return rows


def _lay_out(rows: list[list[Sequence]], vocabulary: Vocabulary, *, length: int) -> Batch:
    rows = [[document for sequence in row for document in sequence.documents] for row in rows]
    shape = (len(rows), length)
    ids = torch.full(shape, vocabulary.pad_id)
    modality = torch.full(shape, int(Modality.CONTROL))
    target = torch.zeros(shape, dtype=torch.bool)
    document = torch.full(shape, NO_DOCUMENT)
    segment_of = torch.full(shape, NO_DOCUMENT)
    position = torch.zeros(shape, dtype=torch.int64)
    features: list[Tensor] = []
    views: list[Views] = []
    for b, row in enumerate(rows):
        start, segment_count = 0, 0
        for d, sequence in enumerate(row):
            if start + len(sequence) > length:
                raise ValueError(
                    f"a sequence of {len(sequence)} tokens does not fit in a row of {length}; "
                    "shorten it or raise the row length"
                )
            document[b, start : start + len(sequence)] = d
            position[b, start : start + len(sequence)] = torch.arange(len(sequence))
            for segment in sequence.segments:
                span = (b, slice(start, start + len(segment.ids)))
                ids[span] = segment.ids
                modality[span] = int(segment.modality)
                target[span] = segment.target
                segment_of[span] = segment_count
                if segment.features is not None:
                    features.append(segment.features)
                if segment.views is not None:
                    views.append(segment.views)
                start += len(segment.ids)
                segment_count += 1
    if features and views:
        raise ValueError(
            f"a batch has {len(features)} images as features and {len(views)} as views; "
            "compute the features of all, or of none"
        )
    return Batch(
        ids=ids,
        modality=modality,
        target=target,
        document=document,
        segment=segment_of,
        position=position,
        features=torch.cat(features) if features else None,
        views=tuple(views) or None,
        axes=_axes(rows, shape),
    )


def _axes(rows: list[list[Sequence]], shape: tuple[int, int]) -> Tensor | None:
    """[B, L, A] positions where images have places on A axes; None where none has.

    Text steps on along all axes at once, and begins again behind the furthest place of an image.
    Source: arXiv:2409.12191, section 2.1 (M-RoPE).
    """
    segments = (segment for row in rows for sequence in row for segment in sequence.segments)
    counts = {len(places[0]) for places in map(_places, segments) if places is not None}
    if not counts:
        return None
    (count,) = counts
    axes = torch.zeros((*shape, count), dtype=torch.int64)
    for b, row in enumerate(rows):
        start = 0
        for sequence in row:
            position = 0
            for segment in sequence.segments:
                n, places = len(segment.ids), _places(segment)
                if places is None:
                    places = torch.arange(n)[:, None].expand(n, count)
                axes[b, start : start + n] = position + places
                position += int(places.max()) + 1 if n else 0
                start += n
    return axes


def _places(segment: Segment) -> Tensor | None:
    return None if segment.views is None else segment.views.places
