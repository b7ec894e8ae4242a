"""Parts of a sampler that tests name by class path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.commit import CommitRule, Progress
from mmdlm.core.order import Candidates, Order


@dataclass(frozen=True)
class Reading(Order):
    """In reading order, in single precision; with `sign` 1 backwards."""

    sign: float = -1.0

    def score(self, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        return self.sign * candidates.column.float()


@dataclass(frozen=True)
class Half(CommitRule):
    """Half of what is open, as a number with a fraction."""

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        return progress.open / 2
