"""Structured noise: a growing masked share over the inner iterations (UniGRPO of MMaDA)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.diffusion.forward import exact_count
from mmdlm.core.diffusion.schedule import Linear, MaskSchedule
from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.noisy_view import (
    NoisyView,
    document_numbers,
    masked_view,
    scored_targets,
)
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary


def spread_timesteps(first: Tensor, iterations: int, total: int) -> Tensor:
    """First timesteps of any shape, int64 -> [iterations, ...]: the rest spread evenly to `total`.

        t_n = floor((n - 1) / (iterations - 1) (total - t_1) + t_1)

    From 100 of 1000 in 5 iterations: 100, 325, 550, 775, 1000.
    Source: arXiv:2505.15809, section on UniGRPO. Its worked example for these numbers goes on from
    100 to 300, 500, 700 and 900, which contradicts its formula; this is the formula.
    """
    n = torch.arange(iterations, device=first.device).view(-1, *([1] * first.dim()))
    return n * (total - first) // max(1, iterations - 1) + first


@dataclass(frozen=True)
class StructuredNoise(LikelihoodEstimator):
    """Over the inner iterations targets are masked from a random share up to all of them.

    The question stays clean. Each document draws its first timestep from 0 .. `total`; the rest are
    `spread_timesteps`. At t a share p_mask(t / total) of the targets is masked, and covered: at
    least one. Each covered token counts 1, so that the mean over the covered tokens, which the
    paper takes for a sequence, is a mean of log p(x_i | x without the masked) at that noise level.

    Attributes:
        schedule: Of the mask: linear for the paper; `Cosine()` masks images as MaskGIT does.

    Source: arXiv:2505.15809 (MMaDA), section on UniGRPO; no code was released. Departure: the
    number of masked tokens is the expected one, not drawn, so that no view is empty.
    """

    total: int = 1000
    schedule: MaskSchedule = Linear()

    def __post_init__(self) -> None:
        self.check_counts("total")

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
        """One view an iteration; a document has its own timesteps."""
        scored = scored_targets(batch, scored)
        device = scored.device
        first = torch.randint(self.total + 1, scored.shape, generator=generator, device=device)
        first = first.gather(1, batch.document.clamp_min(0))  # one a document
        views = []
        for t in spread_timesteps(first, iterations, self.total) / self.total:
            masked, _ = exact_count(
                scored,
                self.schedule.p_mask(t),
                torch.rand(t.shape, generator=generator, device=device),
                group=document_numbers(batch),
                t=t,
                nearest=True,
            )
            weight = torch.ones(t.shape, device=device)
            views.append((masked_view(batch, vocabulary, masked, scored, weight=weight),))
        return tuple(views)
