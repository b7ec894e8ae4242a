"""Distributions of the diffusion time t of each document or segment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import GENERATED

LEAST_TIME = 2.0**-25  # uniform draws in single precision are multiples of 2^-24


@dataclass(frozen=True)
class Timesteps(ABC):
    """Draws the time of each document, or of each segment.

    `per` "segment" lets text and image of one document carry independent noise, so that one network
    learns the joint, both conditionals and both marginals. Source: arXiv:2303.06555, section 3.
    """

    per: Literal["document", "segment"] = "document"

    def __call__(self, batch: Batch, *, generator: torch.Generator) -> Tensor:
        """[B, L] times in (0, 1), one a document or segment; 0 where that has no target.

        A draw of exactly 0, at which losses have a limit but no value, stands for what is too small
        for single precision: it becomes half of the least number that can be drawn.
        """
        rows, length = batch.ids.shape
        number = batch.document if self.per == "document" else batch.segment
        first = F.pad(number[:, 1:] != number[:, :-1], (1, 0))  # an empty segment leaves no trace
        row = torch.arange(rows, device=number.device)[:, None]
        unit = row * length + first.cumsum(1)  # [B, L]
        t = torch.zeros(rows * length, device=number.device)
        for target in self._strata(batch):
            present = torch.zeros(rows * length, dtype=torch.bool, device=number.device)
            present = present.index_fill(0, unit[target], True)
            drawn = self.draw(present, generator=generator).clamp_min(LEAST_TIME)
            t = torch.where(present, drawn, t)
        return t[unit]

    def _strata(self, batch: Batch) -> list[Tensor]:
        """Targets [B, L] whose units are drawn together: a segment is of one modality."""
        if self.per == "document":
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
