"""Read the logits of the open positions part by part, within the ids that each may become."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.host_masks import HostMasks, numbers_of, sent
from mmdlm.core.sampling.forward_passes import ForwardPasses
from mmdlm.core.sampling.generators import Run
from mmdlm.core.sampling.order import Candidates
from mmdlm.core.sampling.unmasking import Progress
from mmdlm.core.vocabulary import GENERATED, Modality, Vocabulary

_MOST = 1 << 22  # elements of logits that are looked at together (32 MB in float64)
_LEAST = 1 << 18  # below which it does not pay to look at fewer together
_SHARE = 64  # of all logits, so that what is made of some is small beside them
Piece = tuple[slice, torch.Generator]  # which of M positions, and what draws for them


@dataclass(frozen=True)
class IdRange:
    """The ids `start` .. `stop` - 1, and which of them a position does not become.

    Attributes:
        start: First id; column 0 of the logits.
        stop: The id after the last.
        suppress_tokens: [n] int64, columns of ids that are never generated.
        masks: [n] int64, columns of mask tokens. They are never drawn, but count in what an order
            takes for the model's confidence.
        deprioritized_ids: [n] int64, columns of ids that the order does not see.
        ends: [n] int64, columns of ids that end a text.
    """

    start: int
    stop: int
    suppress_tokens: Tensor
    masks: Tensor
    deprioritized_ids: Tensor
    ends: Tensor

    @classmethod
    def of(
        cls,
        start: int,
        stop: int,
        *,
        suppress_tokens: Sequence[int],
        masks: Sequence[int],
        deprioritized_ids: Sequence[int],
        ends: Sequence[int],
        device: torch.device,
    ) -> IdRange:
        """Turn ids, some of which may lie outside the range, into columns on the device."""
        columns = (
            torch.tensor([i - start for i in ids if start <= i < stop], dtype=torch.int64)
            for ids in (suppress_tokens, masks, deprioritized_ids, ends)
        )
        return cls(start, stop, *(sent(one, device) for one in columns))

    def allowed(self, logits: Tensor, early: Tensor) -> Tensor:
        """Give suppressed ids no probability.

        Args:
            logits: [m, R].
            early: [n] int64 on the host, which of the m positions must not become an end.

        Returns:
            [m, R] logits.
        """
        logits = _without(logits, self.suppress_tokens)
        if not len(early) or not len(self.ends):
            return logits
        index = sent(early, logits.device)[:, None], self.ends[None]
        return logits.index_put(index, logits.new_tensor(-math.inf))

    def drawable(self, logits: Tensor) -> Tensor:
        """Give mask tokens no probability in the allowed logits [m, R]."""
        return _without(logits, self.masks)

    def preferred(self, logits: Tensor) -> Tensor:
        """Give deprioritized ids no probability in the logits [m, R]."""
        return _without(logits, self.deprioritized_ids)


def ranges_of(
    vocabulary: Vocabulary,
    *,
    suppress_tokens: Sequence[int],
    deprioritized_ids: Sequence[int],
    stop_ids: Sequence[int],
    full_vocabulary: bool,
    allow_mask_token: bool,
    device: torch.device,
) -> dict[Modality, IdRange]:
    """Return the ids that a target of each modality may become.

    Args:
        vocabulary: Ids of the denoiser; a modality without ids is left out.
        suppress_tokens: Ids that are never generated.
        deprioritized_ids: Ids that the order does not see.
        stop_ids: Ids that do not stand at the first targets of a text.
        full_vocabulary: Whether a text position may become any id.
        allow_mask_token: Whether the mask token may be drawn.
        device: Where the logits lie.

    Returns:
        Ranges by modality, with the columns of ids that are excluded.
    """
    ranges = {}
    for modality in GENERATED:
        start, stop = vocabulary.range(modality)
        if start == stop:
            continue
        if full_vocabulary and modality == Modality.TEXT:
            start, stop = 0, vocabulary.size
        ranges[modality] = IdRange.of(
            start,
            stop,
            suppress_tokens=suppress_tokens,
            masks=() if allow_mask_token else (vocabulary.mask_id,),
            deprioritized_ids=deprioritized_ids,
            ends=stop_ids if modality == Modality.TEXT else (),
            device=device,
        )
    return ranges


def check_ranges(host_masks: HostMasks, vocabulary: Vocabulary) -> None:
    """Refuse targets of a modality that the vocabulary lacks.

    Args:
        host_masks: Layout of the batch.
        vocabulary: Of the denoiser.

    Raises:
        ValueError: If there is one.
    """
    for modality in GENERATED:
        start, stop = vocabulary.range(modality)
        if start == stop and (host_masks.target & host_masks.of_modality(modality)).numpy().any():
            raise ValueError(
                f"sampler: the batch asks for {modality.name} tokens, but the model's vocabulary "
                "has none; take a model that was trained with them"
            )


def _without(logits: Tensor, columns: Tensor) -> Tensor:
    return logits.index_fill(-1, columns, -math.inf) if len(columns) else logits


@dataclass(frozen=True)
class Positions:
    """M open positions of one modality in R rows of length L, in reading order.

    Attributes:
        marked: [R, L] bool on the host.
        number: [M] int64 on the host, row * L + column.
        flat: [M] int64, the same on the device of the batch.
        of_row: How many there are in each row.
    """

    marked: Tensor
    number: Tensor
    flat: Tensor
    of_row: tuple[int, ...]

    @classmethod
    def of(cls, marked: Tensor, device: torch.device) -> Positions:
        """Collect the positions that are marked in [R, L] bool on the host."""
        number = numbers_of(marked)
        return cls(marked, number, sent(number, device), tuple(marked.numpy().sum(1).tolist()))

    def early(self, targets: Tensor, count: int) -> Tensor:
        """Mark positions among the first `count` targets [R, L] of their row: [M] bool, on host."""
        if not count:
            return torch.zeros(len(self.number), dtype=torch.bool)
        return (targets.cumsum(1) <= count).ravel()[self.number]

    def candidates(self, progress: Progress) -> Candidates:
        """Describe where they stand, before there are logits; `progress` is of the R rows."""
        length = self.marked.shape[1]
        row = self.flat // length
        return Candidates(
            logits=torch.empty(len(row), 0, device=row.device),
            log_prob=torch.zeros(len(row), device=row.device),
            column=self.flat % length,
            step=progress.step[row],
            steps=progress.steps[row],
        )

    def logits(
        self, passes: ForwardPasses, hidden: Tensor, ids: IdRange, runs: list[Run]
    ) -> Iterator[tuple[Tensor, slice, torch.Generator]]:
        """Yield logits [m, R] of a part, all of one run; which positions they are; the generator.

        Without guidance the logits of all positions exist at once, but nothing else of that size.
        With guidance each branch has its own logits, and only those of a part exist at once.
        """
        width = ids.stop - ids.start
        parts = 1
        if passes.branches > 1 and len(self.number) * width > _MOST:
            parts = passes.branches + 2  # the branches, their difference, and the part before
        together = -(-len(self.number) // parts)
        for some in _grouped(self._pieces(runs, width), together):
            start, stop = some[0][0].start, some[-1][0].stop
            logits = passes.guided.logits_at(
                hidden, self._marks(start, stop), ids=(ids.start, ids.stop)
            )
            for span, generator in some:
                yield logits[span.start - start : span.stop - start], span, generator
            del logits

    def _pieces(self, runs: list[Run], width: int) -> list[Piece]:
        """Return the positions that are read together; one empty piece if there are none."""
        pieces, start = [], 0
        for count, generator in runs:
            at_once = max(1, _elements(count * width, self.flat.device) // width)
            stop = start + count
            for first in range(start, stop, at_once):
                pieces.append((slice(first, min(first + at_once, stop)), generator))
            start = stop
        return pieces or [(slice(0, 0), runs[0][1])]

    def _marks(self, start: int, stop: int) -> Tensor:
        """Mark some of the positions: [R, L] bool on the host."""
        if stop - start == len(self.number):
            return self.marked
        host_masks = torch.zeros(self.marked.numel(), dtype=torch.bool)
        return host_masks.index_fill(0, self.number[start:stop], True).view_as(self.marked)


def _elements(total: int, device: torch.device) -> int:
    """Return how many of `total` logits are read together.

    A GPU loses more by many small kernels than it gains; its memory is large beside `_MOST`.
    """
    return _MOST if device.type != "cpu" else min(max(total // _SHARE, _LEAST), _MOST)


def _grouped(pieces: list[Piece], together: int) -> Iterator[list[Piece]]:
    """Group consecutive pieces, up to `together` positions; each group has at least one piece."""
    group: list[Piece] = []
    for piece in pieces:
        if group and piece[0].stop - group[0][0].start > together:
            yield group
            group = []
        group.append(piece)
    yield group
