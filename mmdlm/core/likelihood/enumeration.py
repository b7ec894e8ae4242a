"""The evidence lower bound of short targets without sampling: every set of masked tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.noisy_view import NoisyView, masked_view, scored_targets
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary

MOST_TARGETS = 16  # 65,535 views


@dataclass(frozen=True)
class EnumeratedElbo(LikelihoodEstimator):
    """The evidence lower bound by enumeration, for documents of a few targets.

        sum_{S, not empty} 1 / (k C(n, k)) sum_{i in S} log p(x_i | x without S),  k = |S|

    It is what `Elbo` estimates, in 2^n - 1 views of n targets: one forward pass for an answer of
    one token, seven for three. Nothing is drawn. Rows hold one document.

    Source: arXiv:2502.09992, appendix B.5, whose evaluation takes one pass for answers of one
    token.
    """

    @staticmethod
    def count(targets: int) -> int:
        """Return the number of views of a document with so many targets."""
        return 2**targets - 1

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
        """All sets, the same for each iteration; rows with fewer targets lack the last views."""
        scored = scored_targets(batch, scored)
        number = scored.sum(1, keepdim=True)  # [B, 1]
        most = int(number.max())
        if most > MOST_TARGETS:
            raise ValueError(
                f"EnumeratedElbo: a document has {most} targets, of which there are "
                f"{self.count(most):,} sets; take Elbo for more than {MOST_TARGETS}"
            )
        sets = [[1, *(k * math.comb(n, k) for k in range(1, most + 1))] for n in range(most + 1)]
        repeats = torch.tensor(sets, device=scored.device)  # [n, k]
        rank = scored.cumsum(1) - 1
        views = []
        for code in range(1, 1 << most):
            inside = (code >> rank.clamp_min(0)) % 2 == 1
            masked = scored & inside & (code < 1 << number)
            share = repeats[number, masked.sum(1, keepdim=True)].clamp_min(1)
            weight = (1 / share).expand(scored.shape)
            views.append(masked_view(batch, vocabulary, masked, scored, weight=weight))
        return (tuple(views),) * iterations
