"""Distributions of the diffusion time t of each document or segment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.blocks import block_runs
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import GENERATED

LEAST_TIME = 2.0**-25  # uniform draws in single precision are multiples of 2^-24


@dataclass(frozen=True)
class Timesteps(ABC):
    """Draws the time of each document, or of each segment.

    `per` "segment" lets text and image of one document carry independent noise, so that one network
    learns the joint, both conditionals and both marginals. Source: arXiv:2303.06555, section 3.
    `per` "block": of each block of a batch that is cut into some (arXiv:2503.09573).

    `low` and `high` clip the times to that range, evenly drawn. Of block diffusion the gradient
    then varies less, but the loss is no bound. Source: arXiv:2503.09573, section 5.2 (clipped noise
    schedules); arXiv:2512.15745 (LLaDA2.0: 0.3 to 0.8).
    """

    per: Literal["document", "segment", "block"] = "document"
    low: float = field(default=0.0, kw_only=True)
    high: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"{type(self).__name__}: low {self.low} and high {self.high} must be a range of "
                "times, 0 <= low < high <= 1"
            )

    def __call__(self, batch: Batch, *, generator: torch.Generator) -> Tensor:
        """[B, L] times in (0, 1), one a document or segment; 0 where that has no target.

        A draw of exactly 0, at which losses have a limit but no value, stands for what is too small
        for single precision: it becomes half of the least number that can be drawn.
        """
        rows, length = batch.ids.shape
        number = self._unit_of(batch)
        first = F.pad(number[:, 1:] != number[:, :-1], (1, 0))  # an empty segment leaves no trace
        row = torch.arange(rows, device=number.device)[:, None]
        unit = row * length + first.cumsum(1)  # [B, L]
        t = torch.zeros(rows * length, device=number.device)
        for target in self._strata(batch):
            present = torch.zeros(rows * length, dtype=torch.bool, device=number.device)
            present = present.index_fill(0, unit[target], True)
            drawn = self.draw(present, generator=generator)
            if (self.low, self.high) != (0.0, 1.0):
                drawn = self.low + (self.high - self.low) * drawn
            drawn = drawn.clamp_min(LEAST_TIME)
            t = torch.where(present, drawn, t)
        return t[unit]

    def _unit_of(self, batch: Batch) -> Tensor:
        """Return a number [B, L] that changes where another time begins."""
        if self.per == "document":
            return batch.document
        if self.per == "segment":
            return batch.segment
        if batch.block is None:
            raise ValueError(
                f"{type(self).__name__}: times per block need a batch in blocks; give the "
                "objective block_lengths, or take a model of block diffusion"
            )
        return block_runs(batch)

    def _strata(self, batch: Batch) -> list[Tensor]:
        """Targets [B, L] whose units are drawn together: a segment is of one modality."""
        if self.per != "segment":
            return [batch.target]
        return [batch.only(modality).target for modality in GENERATED]

    @abstractmethod
    def draw(self, present: Tensor, *, generator: torch.Generator) -> Tensor:
        """[N] bool, which units exist -> [N] times; those of absent units are ignored."""


@dataclass(frozen=True)
class IndependentTimesteps(Timesteps):
    """t ~ U(0, 1) for each unit."""

    def draw(self, present: Tensor, *, generator: torch.Generator) -> Tensor:
        return torch.rand(present.shape, generator=generator, device=present.device)


@dataclass(frozen=True)
class StratifiedTimesteps(Timesteps):
    """t = (u + i / n) mod 1 with one u ~ U(0, 1): the n units of a batch cover [0, 1] evenly.

    Which unit gets which i is random, so that the times of two segments of a document do not follow
    from each other. Source: arXiv:2107.00630, appendix I.1; the permutation is ours.
    """

    def draw(self, present: Tensor, *, generator: torch.Generator) -> Tensor:
        u = torch.rand((), generator=generator, device=present.device)
        key = torch.rand(present.shape, generator=generator, device=present.device)
        i = key.masked_fill(~present, 2.0).argsort().argsort()  # present units come first
        return (u + i / present.sum()) % 1.0
