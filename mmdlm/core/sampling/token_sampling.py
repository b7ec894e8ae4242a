"""What a step of the sampler asks of a device, and what it draws at the open positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mmdlm.core.host_masks import numbers_of, on_host, sent
from mmdlm.core.sampling.forward_passes import ForwardPasses
from mmdlm.core.sampling.generators import Run
from mmdlm.core.sampling.order import Candidates
from mmdlm.core.sampling.unmasking import Progress

_MOST = 1 << 22  # elements of logits that are looked at together (32 MB in float64)
_LEAST = 1 << 18  # below which it does not pay to look at fewer together
_SHARE = 64  # of all logits, so that what is made of some is small beside them
Piece = tuple[slice, torch.Generator]  # which of M positions, and what draws for them


@dataclass(frozen=True)
class HostState:
    """What the host knows before a step; all on the CPU.

    unfinished  [B] bool
    broken      [B] bool, rows of which a number was not finite
    still_open  [B, L] bool
    query_mask       [B, L] bool, places that are computed
    progress    [4, B] int64, see `Progress.on_host`
    """

    unfinished: Tensor
    broken: Tensor
    still_open: Tensor
    query_mask: Tensor
    progress: Tensor

    @classmethod
    def of(
        cls,
        unfinished: Tensor,
        broken: Tensor,
        still_open: Tensor,
        query_mask: Tensor,
        progress: Progress,
    ) -> HostState:
        """Ask the device, once."""
        length = still_open.shape[1]
        numbers = torch.stack([unfinished, broken, *progress.each], dim=1)  # [B, 6] int64
        known = on_host(torch.cat([numbers, still_open, query_mask], dim=1))
        return cls(
            unfinished=known[:, 0].bool(),
            broken=known[:, 1].bool(),
            still_open=known[:, 6 : 6 + length].bool(),
            query_mask=known[:, 6 + length :].bool(),
            progress=known[:, 2:6].T,
        )

    @property
    def is_finished(self) -> bool:
        """Whether no row is left."""
        return not self.unfinished.numpy().any()

    def refuse_broken(self) -> None:
        """Raise ValueError if a number was not finite."""
        broken = int(self.broken.numpy().sum())
        if broken:
            raise ValueError(
                f"the model's numbers are not finite: it gives NaN or infinite logits for {broken} "
                f"of {len(self.broken)} outputs; its weights are damaged, or overflow in this "
                "dtype: load it in another (bfloat16 or float32 in place of float16), or download "
                "or copy the checkpoint again"
            )


@dataclass(frozen=True)
class Range:
    """The ids `start` .. `stop` - 1, and which of them a position does not become.

    suppress_tokens, masks, deprioritized_ids, ends  [n] int64, their columns; masks are never drawn
                                                     either, but
                                        count in what an order takes for the model's confidence
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
    ) -> Range:
        """Of ids, some of which may lie elsewhere."""
        columns = (
            torch.tensor([i - start for i in ids if start <= i < stop], dtype=torch.int64)
            for ids in (suppress_tokens, masks, deprioritized_ids, ends)
        )
        return cls(start, stop, *(sent(one, device) for one in columns))

    def allowed(self, logits: Tensor, early: Tensor) -> Tensor:
        """[m, R] logits in which suppressed ids have no probability.

        early  [n] int64 on the host, which of the m positions do not become an end
        """
        logits = _without(logits, self.suppress_tokens)
        if not len(early) or not len(self.ends):
            return logits
        places = sent(early, logits.device)[:, None], self.ends[None]
        return logits.index_put(places, logits.new_tensor(-math.inf))

    def drawable(self, logits: Tensor) -> Tensor:
        """[m, R] allowed logits in which what is never drawn has no probability."""
        return _without(logits, self.masks)

    def preferred(self, logits: Tensor) -> Tensor:
        """[m, R] logits in which what comes last has no probability."""
        return _without(logits, self.deprioritized_ids)


def _without(logits: Tensor, columns: Tensor) -> Tensor:
    return logits.index_fill(-1, columns, -math.inf) if len(columns) else logits


@dataclass(frozen=True)
class Positions:
    """M open positions of one modality in R rows of length L, in reading order.

    marked  [R, L] bool on the host
    number  [M] int64 on the host, row * L + column
    flat    [M] the same where the batch lies
    of_row  how many there are in each row
    """

    marked: Tensor
    number: Tensor
    flat: Tensor
    of_row: tuple[int, ...]

    @classmethod
    def of(cls, marked: Tensor, device: torch.device) -> Positions:
        """Those marked on the host."""
        number = numbers_of(marked)
        return cls(marked, number, sent(number, device), tuple(marked.numpy().sum(1).tolist()))

    def early(self, targets: Tensor, count: int) -> Tensor:
        """[M] bool on the host: those among the first `count` targets [R, L] of their row."""
        if not count:
            return torch.zeros(len(self.number), dtype=torch.bool)
        return (targets.cumsum(1) <= count).ravel()[self.number]

    def candidates(self, progress: Progress) -> Candidates:
        """Where they stand, before there are logits; `progress` of the R rows."""
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
        self, passes: ForwardPasses, hidden: Tensor, ids: Range, runs: list[Run]
    ) -> Iterator[tuple[Tensor, slice, torch.Generator]]:
        """Logits [m, R] of some of them at a time, all of one run; which they are; its generator.

        Without guidance the logits of all exist at once, but nothing else of that size; with it,
        whose branches each have their own, only those of a part.
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
            for places, generator in some:
                yield logits[places.start - start : places.stop - start], places, generator
            del logits

    def _pieces(self, runs: list[Run], width: int) -> list[Piece]:
        """Positions that are looked at together; one piece of none where there are none."""
        pieces, start = [], 0
        for count, generator in runs:
            at_once = max(1, _elements(count * width, self.flat.device) // width)
            stop = start + count
            for first in range(start, stop, at_once):
                pieces.append((slice(first, min(first + at_once, stop)), generator))
            start = stop
        return pieces or [(slice(0, 0), runs[0][1])]

    def _marks(self, start: int, stop: int) -> Tensor:
        """[R, L] bool on the host, some of the positions."""
        if stop - start == len(self.number):
            return self.marked
        host_masks = torch.zeros(self.marked.numel(), dtype=torch.bool)
        return host_masks.index_fill(0, self.number[start:stop], True).view_as(self.marked)


def _elements(total: int, device: torch.device) -> int:
    """Of `total` logits so many are looked at together.

    A GPU loses more by many small kernels than it gains; its memory is large beside `_MOST`.
    """
    return _MOST if device.type != "cpu" else min(max(total // _SHARE, _LEAST), _MOST)


def _grouped(pieces: list[Piece], together: int) -> Iterator[list[Piece]]:
    """Pieces in turn, as many as have `together` positions; one at least."""
    group: list[Piece] = []
    for piece in pieces:
        if group and piece[0].stop - group[0][0].start > together:
            yield group
            group = []
        group.append(piece)
    yield group


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One tensor of several, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass(frozen=True)
class SampledTokens:
    """What was drawn, all [B, L]; meaningful at open positions of the current block.

    probability  as the order sees it
    log_prob     see `SampleStep`
    """

    ids: Tensor
    score: Tensor
    probability: Tensor
    log_prob: Tensor

    @classmethod
    def at(cls, flat: Tensor, shape: torch.Size, **values: Tensor) -> SampledTokens:
        """Values [M] at places [M] of rows, row * L + column; nothing elsewhere."""
        return cls(
            **{
                name: value.new_zeros(shape.numel()).index_copy(0, flat, value).view(shape)
                for name, value in values.items()
            }
        )

    def among(self, live: Tensor, rows: int) -> SampledTokens:
        """What was drawn for some rows, put among all."""
        if len(live) == rows:
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return SampledTokens(
            **{
                name: value.new_zeros(rows, *value.shape[1:]).index_copy(0, live, value)
                for name, value in values.items()
            }
        )
