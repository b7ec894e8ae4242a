"""Losses that make good answers likelier and bad ones less so, given rewards from outside.

Each takes what an estimator of `mmdlm.core.likelihood` says of the covered tokens,
whatever their modality, and one advantage a row; rows hold one rollout each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmdlm.core.likelihood.noisy_view import NoisyView
from mmdlm.core.likelihood.token_scores import TokenScores
from mmdlm.core.losses.normalization import POLICY, LossNormalization, check_normalization
from mmdlm.core.losses.objective import LossTerms
from mmdlm.rl.statistics import Statistics

Level = Literal["token", "sequence", "product"]
Divergence = Literal["k1", "k3"]
Anchor = Literal["reference", "old"]
KlNormalization = Literal["policy", "view"]


@dataclass(frozen=True)
class PolicyTerms(LossTerms):
    """Sums and counts of "policy", and of "kl" where there is one, to be divided once.

    `PolicyLoss.coefficients` holds the weight of each term. Statistics carry TRL's names.
    """

    statistics: Statistics


class PolicyLoss(ABC):
    """A loss of the policy's scores on a batch of rollouts.

    A step of training draws the views of all inner iterations, scores them with the old policy and
    the reference where they are needed, and then in each iteration scores its views with the policy
    and minimizes sum_k coefficients[k] * sums[k] / counts[k].
    """

    @property
    def needs_old(self) -> bool:
        """Whether scores of the policy before the first update are of use."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether scores of a reference model are needed."""
        return False

    @property
    def coefficients(self) -> dict[str, float]:
        """What each term counts in the loss."""
        return {"policy": 1.0}

    def prepare(self, advantage: Tensor, *, group: Tensor, known: Tensor | None = None) -> Tensor:
        """Turn advantages into those that `__call__` is given; once, on complete groups.

        Args:
            advantage: [N] advantages.
            group: [N] int64, number of the prompt that each answer belongs to.
            known: [N] bool, answers that have a reward; default: all.

        Returns:
            [N] advantages.
        """
        return advantage

    @abstractmethod
    def counts(self, views: Sequence[NoisyView]) -> dict[str, Tensor]:
        """Return the denominators, scalars, known before any forward pass."""

    @abstractmethod
    def __call__(
        self,
        policy: TokenScores,
        advantage: Tensor,
        *,
        old: TokenScores | None = None,
        reference: TokenScores | None = None,
    ) -> PolicyTerms:
        """Compute the terms of the loss; all scores are of the same views.

        Args:
            policy: Scores of the current policy, with gradient.
            advantage: [B] as `prepare` returned them.
            old: Scores of the policy that sampled; None: the policy as it is, with ratio 1.
            reference: Scores of the reference model, for the KL term; None: without it.

        Returns:
            Sums of the terms, and statistics.
        """


@dataclass(frozen=True)
class ClippedSurrogate(PolicyLoss):
    """PPO's clipped surrogate, with a KL penalty.

        -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta KL

    with A the advantage of the row and the ratio r, by `level`,

        "token"     exp(l_i - l_i,old), each covered token its own (diffu-GRPO, UniGRPO, TraceRL)
        "sequence"  exp(sum_i (l_i - l_i,old) / sum of weights), a row's mean (GSPO)
        "product"   exp(sum_i (l_i - l_i,old)), the ratio of the estimated probabilities

    where l_i is the estimate token by token (`TokenScores.total`). The bound (`Elbo`) gives l_i no
    meaning of its own, only their sum: take a ratio of the row for it.

    As published: d1 epsilon 0.5, beta 0.04, "token"; TraceRL epsilon 0.2, beta 0.01 to the old
    policy, "sequence" with the KL by "view"; UniGRPO "sequence", its epsilon and beta are not
    given.

    Attributes:
        kl: "k3": exp(d) - d - 1, d = log p_anchor - log p, never negative. "k1": -d, unbiased as a
            number, while its gradient is none of the KL's: zero on average where the tokens are the
            policy's own. Of each view by itself; a token's is the mean over its views, by their
            weights.
        anchor: What the KL is to: the reference model, or the old policy (TraceRL).
        loss_normalization: What the surrogate is divided by. "token": the covered tokens of all
            rows (d1, DAPO). "sequence": each row's own covered tokens, then the rows that have any
            (GRPO, UniGRPO, TraceRL). "constant": the rows that have any, times `length` (Dr. GRPO).
        kl_normalization: What the KL is divided by. "policy": as the surrogate, by the
            normalization. "view": its sum over the covered tokens of a view of a row by the number
            of such views that cover any (TraceRL's code, in which each view is a sample): beta
            counts as much more as there are tokens in a view.

    Source: arXiv:1707.06347, equation 7 (PPO); arXiv:2402.03300, section 4.1 (GRPO: groups, k3);
    arXiv:2507.18071 (GSPO: "sequence"); arXiv:2503.20783 (Dr. GRPO: "constant"); with views of
    diffusion models: arXiv:2504.12216 (d1), arXiv:2505.15809 (UniGRPO), arXiv:2509.06949 (TraceRL).
    Departures from d1's code: there one inner iteration with beta above 0 fails, and a setting to
    move the reference has no effect, as that is the model without its adapter.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    level: Level = "token"
    beta: float = 0.0
    kl: Divergence = "k3"
    anchor: Anchor = "reference"
    loss_normalization: LossNormalization = "token"
    length: int | None = None
    kl_normalization: KlNormalization = "policy"

    def __post_init__(self) -> None:
        choices = (
            ("level", ("token", "sequence", "product")),
            ("kl", ("k1", "k3")),
            ("anchor", ("reference", "old")),
            ("kl_normalization", ("policy", "view")),
        )
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(
                    f"ClippedSurrogate: {name} {getattr(self, name)!r} is not one of "
                    f"{', '.join(known)}"
                )
        check_normalization(self.loss_normalization, POLICY, "ClippedSurrogate")
        for name in ("epsilon", "epsilon_high", "beta"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"ClippedSurrogate: {name} must not be negative, got {value}")
        if self.length is not None and self.length < 1:
            raise ValueError(f"ClippedSurrogate: length must be at least 1, got {self.length}")
        if (self.loss_normalization == "constant") != (self.length is not None):
            raise ValueError(
                "ClippedSurrogate: loss_normalization 'constant' needs a length, and no other has "
                f"one; got {self.loss_normalization!r} and {self.length}"
            )

    @property
    def needs_old(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0 and self.anchor == "reference"

    @property
    def coefficients(self) -> dict[str, float]:
        return {"policy": 1.0} | ({"kl": self.beta} if self.beta else {})

    def counts(self, views: Sequence[NoisyView]) -> dict[str, Tensor]:
        return self._counts(torch.stack([view.covered for view in views]))

    def __call__(
        self,
        policy: TokenScores,
        advantage: Tensor,
        *,
        old: TokenScores | None = None,
        reference: TokenScores | None = None,
    ) -> PolicyTerms:
        if self.needs_reference and reference is None:
            raise ValueError(
                "ClippedSurrogate: a KL to the reference needs its scores; pass them, or set beta "
                "to 0"
            )
        covered, log_prob = policy.anywhere, policy.total
        before = (old or policy).total.detach()
        log_ratio = self._at_level(log_prob - before, policy)
        # An infinite ratio would make even the gradients NaN that clipping takes away. Where the
        # answer was bad this clips, too: PPO itself would follow a ratio that has run away.
        ratio = log_ratio.clamp_max(0.5 * _longest(log_ratio)).exp()
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        better, worse = advantage[:, None] > 0, advantage[:, None] < 0
        unclipped = ratio * advantage[:, None]
        clipped = ratio.clamp(1 - self.epsilon, 1 + high) * advantage[:, None]
        sums = {"policy": self._sum(-torch.minimum(unclipped, clipped), covered)}

        low_clipped = ((ratio < 1 - self.epsilon) & worse).float()
        high_clipped = ((ratio > 1 + high) & better).float()
        statistics = Statistics.means(
            region_mean=(low_clipped + high_clipped, covered),
            low_mean=(low_clipped, covered),
            high_mean=(high_clipped, covered),
        )
        statistics = statistics + _extremes(statistics)
        statistics = statistics.named(
            {name: f"clip_ratio/{name}" for part in statistics.parts for name in part}
        )
        anchor = reference if self.anchor == "reference" else (old or policy)
        if anchor is not None:
            divergence = self._divergence(policy, anchor)
            statistics = statistics + Statistics.means(kl=(divergence, covered))
            if self.beta and self.kl_normalization == "view":
                each = self._divergences(policy, anchor)
                sums["kl"] = torch.where(policy.covered, each, 0.0).sum()
            elif self.beta:
                sums["kl"] = self._sum(divergence, covered)
        return PolicyTerms(
            sums=sums,
            counts=self._counts(policy.covered),
            statistics=statistics + entropy_statistics(policy),
        )

    def _at_level(self, log_ratio: Tensor, policy: TokenScores) -> Tensor:
        """[B, L] -> [B, L]; of a row, the same everywhere."""
        if self.level == "token":
            return log_ratio
        row = log_ratio.sum(1, keepdim=True)
        if self.level == "sequence":
            weight = policy.weight.sum(0).sum(1, keepdim=True)
            row = row / torch.where(weight > 0, weight, 1.0)
        return row.expand_as(log_ratio)

    def _divergences(self, policy: TokenScores, anchor: TokenScores) -> Tensor:
        """[K, B, L]: of each view by itself, as weights belong before no exponential."""
        d = anchor.log_prob.detach() - policy.log_prob
        if self.kl == "k1":
            return -d
        d = d.clamp_max(0.5 * _longest(d))  # an infinite one would end the run
        return torch.expm1(d) - d

    def _divergence(self, policy: TokenScores, anchor: TokenScores) -> Tensor:
        """[B, L], the mean over the views of a token."""
        value = self._divergences(policy, anchor)
        weight = torch.where(policy.covered, policy.weight, 0.0)
        total = weight.sum(0)
        return (weight * value).sum(0) / torch.where(total > 0, total, 1.0)

    def _sum(self, value: Tensor, covered: Tensor) -> Tensor:
        value = torch.where(covered, value, 0.0)
        if self.loss_normalization == "sequence":
            value = value / covered.sum(1, keepdim=True).clamp_min(1)
        return value.sum()

    def _counts(self, covered: Tensor) -> dict[str, Tensor]:
        """Return the divisors of the terms, for views that cover [K, B, L]."""
        anywhere = covered.any(0)
        if self.loss_normalization == "token":
            count = anywhere.sum()
        else:  # a row that covers nothing is no rollout to learn from
            count = anywhere.any(1).sum() * (self.length or 1)
        counts = dict.fromkeys(self.coefficients, count)
        if "kl" in counts and self.kl_normalization == "view":
            counts["kl"] = covered.any(2).sum()
        return counts


@dataclass(frozen=True)
class Wd1(PolicyLoss):
    """wd1: likelihood of good answers up, of bad ones down, with no ratio, old policy or reference.

        sum_j (w-_j - w+_j) log p(x_j),    w+ = softmax(psi A), w- = softmax(-psi A)

    over the answers j of a group, log p(x_j) being the sum of the estimates of a row; the mean over
    groups. Equal advantages cancel.

    Source: arXiv:2507.08838 (wd1), with the likelihood of diffu-GRPO. Departure: its code takes the
    softmax over a micro-batch, whichever groups are in it.
    """

    psi: float = 1.0

    def __post_init__(self) -> None:
        if self.psi <= 0:
            raise ValueError(f"Wd1: psi must be above 0, got {self.psi}")

    def prepare(self, advantage: Tensor, *, group: Tensor, known: Tensor | None = None) -> Tensor:
        """[N] n (w+ - w-) for groups of n, so that the mean over rows is that over groups.

        Answers without a reward are in no group.
        """
        known = torch.ones_like(group, dtype=torch.bool) if known is None else known
        _, index = group.unique(return_inverse=True)
        own = (index[:, None] == index[None, :]) & known[None, :]  # [N, N]
        scaled = self.psi * advantage
        up, down = (
            sign.expand_as(own).masked_fill(~own, -torch.inf).softmax(1).diagonal()
            for sign in (scaled, -scaled)
        )
        return torch.where(known, own.sum(1) * (up - down), 0.0)

    def counts(self, views: Sequence[NoisyView]) -> dict[str, Tensor]:
        covered = torch.stack([view.covered for view in views]).any(0)
        return {"policy": covered.any(1).sum()}

    def __call__(
        self,
        policy: TokenScores,
        advantage: Tensor,
        *,
        old: TokenScores | None = None,
        reference: TokenScores | None = None,
    ) -> PolicyTerms:
        """`advantage` is what `prepare` made of them."""
        return PolicyTerms(
            sums={"policy": -(advantage * policy.total.sum(1)).sum()},
            counts={"policy": policy.anywhere.any(1).sum()},
            statistics=entropy_statistics(policy),
        )


def _extremes(means: Statistics) -> Statistics:
    """Of the shares clipped, TRL's `low_min` and `high_max`, over micro-batches and processes."""
    if not int(means.counts["low_mean"]):
        return Statistics()
    low, high = (means.sums[name] / means.counts[name] for name in ("low_mean", "high_mean"))
    return Statistics(least={"low_min": low}, most={"high_max": high})


def _longest(x: Tensor) -> float:
    """Return the largest number whose exponential is finite."""
    return math.log(torch.finfo(x.dtype).max)


def entropy_statistics(policy: TokenScores) -> Statistics:
    """`entropy`, a mean over all covered tokens, where it was computed."""
    if policy.entropy is None:
        return Statistics()
    return Statistics.means(entropy=(policy.entropy, policy.covered))
