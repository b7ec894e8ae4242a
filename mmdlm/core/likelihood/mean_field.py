"""One-step mean-field estimate of a sequence's log-probability (diffu-GRPO of d1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.noisy_view import (
    NoisyView,
    masked_view,
    scored_targets,
    some_context,
)
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class OneStepMeanField(LikelihoodEstimator):
    """All targets masked at once, one forward pass: log p(x) ~ sum_i log p(x_i | context).

    Each token of the context is masked, too, with probability `prompt_mask_prob`, drawn again
    in each iteration: several updates on one batch then see different contexts. Structure (CONTROL)
    and feature slots stay. With prompt_mask_prob = 0 it is exact for one step of sampling that
    commits all targets, and for a model that looks at no target, and no bound otherwise.

    Source: arXiv:2504.12216 (d1), section on diffu-GRPO; 0.15 in its runs, 0.3 in its code's
    defaults. Departures from the code: there the micro-step chooses the seed of a mask, so that
    with accumulation each micro-batch sees half of the seeds, each twice, and the global generator
    is reseeded; left padding is attended to; special ids of the prompt are masked as well.
    """

    prompt_mask_prob: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_probabilities("prompt_mask_prob")

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
        """One view an iteration."""
        scored = scored_targets(batch, scored)
        weight = torch.ones(scored.shape, device=scored.device)
        return tuple(
            (
                masked_view(
                    batch,
                    vocabulary,
                    scored,
                    scored,
                    weight=weight,
                    hidden=some_context(batch, self.prompt_mask_prob, generator),
                ),
            )
            for _ in range(iterations)
        )
