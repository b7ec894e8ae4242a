"""Parts that tests name by class path: of a sampler, and an estimator without noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.noisy_view import NoisyView, masked_view, scored_targets
from mmdlm.core.sampling.order import Candidates, Order
from mmdlm.core.sampling.unmasking import Progress, UnmaskingRule
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class Reading(Order):
    """In reading order, in single precision; with `sign` 1 backwards."""

    sign: float = -1.0

    def score(self, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        return self.sign * candidates.column.float()


@dataclass(frozen=True)
class Half(UnmaskingRule):
    """Half of what is open, as a number with a fraction."""

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        return progress.open / 2


@dataclass(frozen=True)
class Thrice(LikelihoodEstimator):
    """All targets masked, three times over, each time counted a third."""

    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[tuple[NoisyView, ...], ...]:
        scored = scored_targets(batch, scored)
        third = torch.full(scored.shape, 1 / 3, device=scored.device)
        return ((masked_view(batch, vocabulary, scored, scored, weight=third),) * 3,) * iterations
