"""SPG: a policy gradient between a lower and an upper bound of the likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.likelihood.noisy_view import NoisyView
from mmdlm.core.likelihood.token_scores import TokenScores
from mmdlm.rl.policy_loss import PolicyLoss, PolicyTerms, entropy_statistics


@dataclass(frozen=True)
class Spg(PolicyLoss):
    """SPG: policy gradient between two bounds, the lower for good answers, the upper for bad ones.

        -A L where A >= 0,    -A (mix U + (1 - mix) L) where A < 0

    with, for weights w_k of views k that each cover part of a row's n tokens,

        L = sum_k sum_i w_k log p_k(x_i)                                (evidence lower bound)
        U = n / c sum_i 1 / beta log sum_k w_k p_k(x_i)^beta            (evidence upper bound)

    over the tokens that some view covers, c of them. Rows are averaged by their lengths n, the sum
    of all weights of a row, so that L and U enter as sums. No ratio, old policy or reference.

    U bounds log p only up to a constant, and from above only in the mean over views: the logarithm
    of few of them lies below. Weights must be those of a bound: take `Elbo` or `BlockRandom`.

    Attributes:
        eubo_beta: Beta; 1.5 as published, 1 to 2 tried.
        mix: 0.5 as published; 1 is only the upper bound.

    Source: arXiv:2510.09541 (SPG) and its published code. Departure: p^beta is summed by
    logarithms; there, tokens whose power underflows drop out.
    """

    eubo_beta: float = 1.5
    mix: float = 0.5

    def __post_init__(self) -> None:
        if self.eubo_beta < 1:
            raise ValueError(f"Spg: eubo_beta must be at least 1, got {self.eubo_beta}")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"Spg: mix must lie in [0, 1], got {self.mix}")

    def counts(self, views: Sequence[NoisyView]) -> dict[str, Tensor]:
        return {"policy": torch.stack([view.weight.sum() for view in views]).sum()}

    def __call__(
        self,
        policy: TokenScores,
        advantage: Tensor,
        *,
        old: TokenScores | None = None,
        reference: TokenScores | None = None,
    ) -> PolicyTerms:
        lower = policy.total.sum(1)  # [B]
        value = lower
        if self.mix > 0:
            mixed = self.mix * self.upper(policy) + (1 - self.mix) * lower
            value = torch.where(advantage < 0, mixed, lower)
        return PolicyTerms(
            sums={"policy": -(advantage * value).sum()},
            counts={"policy": policy.weight.sum()},
            statistics=entropy_statistics(policy),
        )

    def upper(self, policy: TokenScores) -> Tensor:
        """[B], U."""
        covered = policy.anywhere
        exponent = policy.weight.clamp_min(torch.finfo(policy.weight.dtype).tiny).log()
        exponent = (exponent + self.eubo_beta * policy.log_prob).masked_fill(
            ~policy.covered, -torch.inf
        )
        token = torch.where(covered, exponent.logsumexp(0) / self.eubo_beta, 0.0)  # [B, L]
        length = policy.weight.sum((0, 2))
        return length * token.sum(1) / covered.sum(1).clamp_min(1)
