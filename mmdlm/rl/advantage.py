"""How much better than its group an answer is, and which groups have something to teach."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.rl.statistics import Statistics


class Advantage(ABC):
    """From rewards to advantages.

    A group is the answers to one prompt; all of it must be at hand, on one process. A reward of NaN
    (no reward function had anything to say) gets no advantage and counts in no mean.
    """

    @abstractmethod
    def __call__(self, reward: Tensor, *, group: Tensor) -> Tensor:
        """Rewards [N], NaN where unknown, and the number of each one's group [N] int64 -> [N]."""


@dataclass(frozen=True)
class MeanBaseline(Advantage):
    """A = r - mean of the group, not divided by the deviation.

    Source: published code of arXiv:2504.12216 (d1); arXiv:2503.20783 (Dr. GRPO) on why: to divide
    weighs questions that are nearly always right or wrong more than the rest.
    """

    def __call__(self, reward: Tensor, *, group: Tensor) -> Tensor:
        mean, _ = group_moments(reward, group)
        return torch.nan_to_num(reward - mean)


@dataclass(frozen=True)
class Standardized(Advantage):
    """A = (r - mean of the group) / (deviation of the group + epsilon).

    The deviation divides by n - 1. Source: arXiv:2402.03300 (GRPO), section 4.1; UniGRPO's and, as
    the z-score, TraceRL's.
    """

    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if self.epsilon <= 0:
            raise ValueError(f"Standardized: epsilon must be above 0, got {self.epsilon}")

    def __call__(self, reward: Tensor, *, group: Tensor) -> Tensor:
        mean, deviation = group_moments(reward, group)
        return torch.nan_to_num((reward - mean) / (deviation + self.epsilon))


@dataclass(frozen=True)
class AccuracyFilter:
    """Keeps the prompts whose share of right answers lies between bounds, and is neither 0 nor 1.

    Where all answers are right, or all are wrong, there is nothing to tell apart; dropped rows are
    left out of `scored`, so that they take no part in a loss or in what it is divided by.

    Source: published code of arXiv:2509.06949 (TraceRL), bounds 0.2 and 0.8.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"AccuracyFilter: 0 <= low <= high <= 1 is needed, got {self.low} and {self.high}"
            )

    def __call__(self, right: Tensor, *, group: Tensor) -> Tensor:
        """[N] how right each answer is, 0 to 1, NaN where unknown; groups [N] -> [N] bool, kept."""
        accuracy, _ = group_moments(right, group)
        accuracy = accuracy.nan_to_num(nan=0.0)
        return (
            (accuracy > 0) & (accuracy < 1) & (accuracy >= self.low) & (accuracy <= self.high)
        ) & ~right.isnan()


def group_moments(value: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (n - 1) of each one's group, [N] each; of what is not NaN.

    A group without a value has mean NaN; the deviation of fewer than two is 0.
    """
    known = ~value.isnan()
    number = _of_group(known.to(value.dtype), group)
    mean = _of_group(value.masked_fill(~known, 0.0), group) / number
    square = _of_group((value - mean).square().masked_fill(~known, 0.0), group)
    return mean, (square / (number - 1).clamp_min(1)).sqrt()


def _of_group(value: Tensor, group: Tensor) -> Tensor:
    """[N] the sum over each one's group."""
    _, index = group.unique(return_inverse=True)
    return torch.zeros_like(value).index_add(0, index, value)[index]


def reward_statistics(reward: Tensor, *, group: Tensor) -> Statistics:
    """`reward`, `reward_std` and `frac_reward_zero_std`, as TRL has them: means over answers."""
    mean, deviation = group_moments(reward, group)
    known = ~mean.isnan()
    equal = (deviation <= 1e-8).to(reward.dtype)
    return Statistics.means(
        reward=(mean, known), reward_std=(deviation, known), frac_reward_zero_std=(equal, known)
    )
