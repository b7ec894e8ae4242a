"""Coupled sampling: a mask, its complement and the full mask (coupled-GRPO of DiffuCoder)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.noisy_view import (
    NoisyView,
    masked_view,
    scored_targets,
)
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class Coupled(LikelihoodEstimator):
    """A mask and its complement, which cover each target once, and the full mask besides.

    With t ~ U(low, high) and each target in the mask M with probability t,

        1/2 log p(x_i | all masked) + 1/2 (1/t log p(x_i | x without M)          for i in M
                                           1/(1-t) log p(x_i | x without M's complement) else)

    The prompt stays clean. The mean is half of the fully masked log-probability, half of that at
    noise level t and half of that at 1 - t. The halves add up to 3/2, so that a log-ratio is half
    as large again as one token's own (at most 3 times): the clipping range should allow for it.

    Source: arXiv:2506.20639 (DiffuCoder), section on coupled-GRPO, and its published code for the
    average with the full mask and the range of t. Departure: t is drawn for each document, there
    for the whole batch.
    """

    low: float = 0.2
    high: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.low <= self.high < 1:
            raise ValueError(
                f"Coupled: 0 < low <= high < 1 is needed, got {self.low} and {self.high}"
            )

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
        """Three views an iteration: everything masked, a mask, its complement."""
        scored = scored_targets(batch, scored)
        result = []
        for _ in range(iterations):
            u, draw = torch.rand((2, *scored.shape), generator=generator, device=scored.device)
            t = self.low + (self.high - self.low) * u.gather(1, batch.document.clamp_min(0))
            mask = scored & (draw < t)
            parts = ((scored, torch.ones_like(t)), (mask, t), (scored & ~mask, 1 - t))
            result.append(
                tuple(
                    masked_view(batch, vocabulary, masked, scored, weight=0.5 / share)
                    for masked, share in parts
                )
            )
        return tuple(result)
