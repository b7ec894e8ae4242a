"""Run the forward passes of a sampler: guided, optionally cached, of the rows that need one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.blocks import first_columns
from mmdlm.core.denoiser import Denoiser
from mmdlm.core.host_masks import on_host, sent
from mmdlm.core.kv_cache import KVCache
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance, GuidedDenoiser
from mmdlm.core.sequence import NO_DOCUMENT, Batch, concatenate
from mmdlm.core.vocabulary import Modality

_GROWTH = 64  # tokens


@dataclass(frozen=True)
class ForwardPasses:
    """The rows of a batch that are not finished, and the guided denoiser that they share.

    Attributes:
        denoiser: Without guidance.
        guidance: Guides it.
        rows: R numbers of rows in the batch that sampling began with.
        batch: Those rows, with host masks; their first columns, where a cache grows.
        whole: Those rows with all columns.
        others: The unconditional batches of guidance, of the same rows; empty: guidance makes its
            own.
        kv_cache: What cached passes keep; None: nothing is cached.
    """

    denoiser: Denoiser
    guidance: ClassifierFreeGuidance
    rows: tuple[int, ...]
    batch: Batch
    whole: Batch
    others: tuple[Batch, ...]
    kv_cache: KVCache | None

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        batch: Batch,
        *,
        guidance: ClassifierFreeGuidance,
        unconditional: Batch | tuple[Batch, ...] | None,
        use_cache: bool,
    ) -> ForwardPasses:
        """Begin with all rows of a batch."""
        if unconditional is None:
            unconditional = ()
        elif isinstance(unconditional, Batch):
            unconditional = (unconditional,)
        kv_cache = KVCache() if use_cache else None
        others = tuple(one.with_host_masks() for one in unconditional)
        batch = batch.with_host_masks()
        return cls(denoiser, guidance, tuple(range(len(batch))), batch, batch, others, kv_cache)

    @cached_property
    def live(self) -> Tensor:
        """The numbers `rows`, [R] int64 on the device of the batch."""
        return sent(torch.tensor(self.rows, dtype=torch.int64), self.batch.ids.device)

    @cached_property
    def guided(self) -> Denoiser:
        """The denoiser of these rows."""
        return self.guidance(self.denoiser, self.batch, unconditional=self.others or None)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row and of its other branches, without padding: [R] on the host."""
        lengths = [one.host_masks.length for one in (self.batch, *self.others)]
        return torch.stack(lengths).amax(0)

    @property
    def branches(self) -> int:
        """Number of batches whose logits are combined into those of one."""
        return self.guided.branches if isinstance(self.guided, GuidedDenoiser) else 1

    def only(self, unfinished: Tensor) -> ForwardPasses:
        """Drop the rows that are finished by now; `unfinished` is [B] bool, of all rows."""
        going_on = unfinished.numpy().tolist()
        kept = [number for number, row in enumerate(self.rows) if going_on[row]]
        return self if len(kept) == len(self.rows) else self._rows(kept)

    def up_to(self, columns: int, *, begins: bool) -> ForwardPasses:
        """Leave out what lies behind some columns, now and in what is cached.

        A cache grows by several tokens at a time, so that it is not copied for each of them. With
        unconditional batches of their own, whose targets lie in other columns, all stay.

        Args:
            columns: That are needed.
            begins: Whether this is the first pass; later ones never have fewer columns.

        Returns:
            Passes over at least so many columns.
        """
        length = self.whole.ids.shape[1]
        columns = min(length, -(-columns // _GROWTH) * _GROWTH)
        if self.others or (not begins and columns <= self.batch.ids.shape[1]):
            return self
        assert self.kv_cache is not None
        self.kv_cache.grow(columns)
        return replace(self, batch=first_columns(self.whole, columns))

    def hidden(self, x_t: Tensor, query_mask: Tensor) -> Tensor:
        """Return the hidden states [R, L, D] of the rows that are not finished.

        Args:
            x_t: [B, L] noisy ids of all rows.
            query_mask: [B, L] bool on the host. Without a cache: what will be read; with one: what
                is computed again.

        Returns:
            [R, L, D], in the order of the rows, of the columns that `batch` has.
        """
        length = self.batch.ids.shape[1]
        return self.guided.hidden(
            x_t[self.live, :length],
            self.batch,
            query_mask=query_mask[list(self.rows), :length],
            kv_cache=self.kv_cache,
        )

    def asked(self, x_t: Tensor, query_mask: Tensor) -> tuple[Tensor, Batch, Tensor]:
        """Return what `hidden` asks the denoiser: ids, their batch and the positions to compute."""
        x_t, query_mask = x_t[self.live], query_mask[list(self.rows)]
        if not isinstance(self.guided, GuidedDenoiser):
            return x_t, self.batch, query_mask
        return self.guided.laid_out(x_t, self.batch, query_mask)

    def answered(self, hidden: Tensor) -> Tensor:
        """Return the states that the denoiser gave for `asked` as `hidden` returns them."""
        if isinstance(self.guided, GuidedDenoiser):
            return self.guided.side_by_side(hidden)
        return hidden

    def first_hidden(self, x_t: Tensor, query_mask: Tensor) -> Tensor:
        """Return the same before anything is drawn: rows that are alike are computed once.

        The rows of a group have the same prompt, and all their targets are still masked.
        """
        alike = self._alike(x_t)
        if alike is None:
            return self.hidden(x_t, query_mask)
        first, of_row = alike
        some = self._rows(first)
        inverse = sent(torch.tensor(of_row), x_t.device)
        hidden = some.hidden(x_t, query_mask)[inverse]
        if self.kv_cache is not None and some.kv_cache is not None:
            known = some.kv_cache.rows(inverse, of=len(first))
            self.kv_cache.keys, self.kv_cache.values = known.keys, known.values
            self.kv_cache.hidden = known.hidden
        return hidden

    def _alike(self, x_t: Tensor) -> tuple[list[int], list[int]] | None:
        """Find U rows no two of which are alike, and which of them each of the R rows is like.

        Returns:
            None if all rows differ, or if images would have to be compared.
        """
        batches = (self.batch, *self.others)
        if len(self.rows) < 2 or any(
            one.features is not None or one.views is not None for one in batches
        ):
            return None
        columns = [x_t[self.live, : self.batch.ids.shape[1]]]
        for one in batches:
            columns += [one.ids, one.modality, one.target.long(), one.document, one.position]
            if one.block is not None:
                columns.append(one.block)
            if one.axes is not None:
                columns.append(one.axes.flatten(1))
            if one.lookahead is not None:
                columns.append(one.lookahead[:, None])
        first: dict[bytes, int] = {}  # number of the row that is seen first, among such rows
        kept: list[int] = []
        of_row: list[int] = []
        for row, content in enumerate(on_host(torch.cat(columns, 1)).numpy()):
            seen = first.setdefault(content.tobytes(), len(kept))
            if seen == len(kept):
                kept.append(row)
            of_row.append(seen)
        return None if len(kept) == len(of_row) else (kept, of_row)

    def taken(self, kept: Sequence[int]) -> ForwardPasses:
        """Return the passes of some rows, none of them finished, which are all rows from now on."""
        places = [self.rows.index(row) for row in kept]
        return replace(self._rows(places), rows=tuple(range(len(kept))))

    def with_length(self, length: int) -> ForwardPasses:
        """Return the passes of rows that were padded, or cut, to a length; nothing is cached."""
        assert self.kv_cache is None, "cached keys and values have the length they have"
        batch = with_length(self.batch, length)
        return replace(
            self,
            batch=batch,
            whole=batch,
            others=tuple(with_length(one, length) for one in self.others),
        )

    @classmethod
    def joined(cls, several: Sequence[ForwardPasses]) -> ForwardPasses:
        """Return the passes of the rows of several, of one length and none of them finished."""
        batch = concatenate(one.batch for one in several)
        return replace(
            several[0],
            rows=tuple(range(sum(len(one.rows) for one in several))),
            batch=batch,
            whole=batch,
            others=tuple(map(concatenate, zip(*(one.others for one in several), strict=True))),
        )

    def _rows(self, kept: list[int]) -> ForwardPasses:
        index = torch.tensor(kept, dtype=torch.int64)
        kv_cache = self.kv_cache
        if kv_cache is not None:
            kv_cache = kv_cache.rows(sent(index, self.batch.ids.device), of=len(self.rows))
        batch = self.batch.rows(index)
        return replace(
            self,
            rows=tuple(self.rows[number] for number in kept),
            batch=batch,
            whole=batch if self.whole is self.batch else self.whole.rows(index),
            others=tuple(one.rows(index) for one in self.others),
            kv_cache=kv_cache,
        )


def hidden_of(several: Sequence[tuple[ForwardPasses, Tensor, Tensor]]) -> list[Tensor]:
    """Return the hidden states of several groups of rows, all by one forward pass.

    Rows of other lengths are padded to the longest. Groups with a cache have a pass of their own.

    Args:
        several: Of each group its passes, its noisy ids [B, L] and its query mask [B, L], as in
            `ForwardPasses.hidden`. All have the same denoiser.

    Returns:
        The states [R, L, D] of each group.
    """
    together = [one for one in several if one[0].kv_cache is None]
    if len(together) < 2:
        return [passes.hidden(x_t, query_mask) for passes, x_t, query_mask in several]
    length = max(x_t.shape[1] for _, x_t, _ in together)
    asked = [passes.asked(x_t, query_mask) for passes, x_t, query_mask in together]
    joint = together[0][0].denoiser.hidden(
        torch.cat([of_length(x, length) for x, _, _ in asked]),
        concatenate(with_length(batch, length) for _, batch, _ in asked),
        query_mask=torch.cat([of_length(query_mask, length) for _, _, query_mask in asked]),
    )
    parts = iter(joint.split([len(x) for x, _, _ in asked]))
    return [
        passes.answered(next(parts)[:, : x_t.shape[1]])
        if passes.kv_cache is None
        else passes.hidden(x_t, query_mask)
        for passes, x_t, query_mask in several
    ]


def with_length(batch: Batch, length: int) -> Batch:
    """Return a batch whose rows are padded on the right, or whose padding is cut, to a length."""
    if batch.ids.shape[1] == length:
        return batch
    axes, more = batch.axes, length - batch.ids.shape[1]
    if axes is not None:
        axes = F.pad(axes, (0, 0, 0, more))
    return replace(
        batch,
        ids=of_length(batch.ids, length),
        modality=of_length(batch.modality, length, fill=Modality.CONTROL),
        target=of_length(batch.target, length),
        document=of_length(batch.document, length, fill=NO_DOCUMENT),
        segment=of_length(batch.segment, length, fill=NO_DOCUMENT),
        position=of_length(batch.position, length),
        axes=axes,
        block=None if batch.block is None else of_length(batch.block, length),
        noisy=None if batch.noisy is None else of_length(batch.noisy, length),
    ).with_host_masks()


def of_length(rows: Tensor, length: int, *, fill: int = 0) -> Tensor:
    """Pad the rows [B, L] on the right, or cut them, to a length."""
    return F.pad(rows, (0, length - rows.shape[1]), value=fill)
