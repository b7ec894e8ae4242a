"""How much is masked at time t: 0 is clean, 1 is (nearly) all noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class MaskSchedule(ABC):
    """An increasing function p_mask: [0, 1] -> [0, 1] and what follows from it.

    All functions work element by element on times of any shape. "Cosine" by itself means different
    curves in different projects, so each subclass states its formula.
    """

    @abstractmethod
    def p_mask(self, t: Tensor) -> Tensor:
        """Probability that a target token is masked at time t."""

    @abstractmethod
    def slope(self, t: Tensor) -> Tensor:
        """p_mask'(t), the rate at which tokens are masked; never negative."""

    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a target token is still clean, 1 - p_mask(t)."""
        return 1 - self.p_mask(t)

    def weight(self, t: Tensor) -> Tensor:
        """p_mask'(t) / p_mask(t): what makes the cross-entropy of masked tokens a bound in nats.

        Finite everywhere: where p_mask is zero nothing is masked, and the value is never used.
        Source: arXiv:2406.07524, equation 11.
        """
        p_mask = self.p_mask(t)
        return self.slope(t) / p_mask.clamp_min(torch.finfo(p_mask.dtype).tiny)


@dataclass(frozen=True)
class Linear(MaskSchedule):
    """p_mask(t) = (1 - eps) t + eps.

    eps = 1e-3 is LLaDA's, which bounds the weight by 1 / eps, in complementary masks as well; 0
    leaves nothing of the bound out.
    Source: arXiv:2502.09992, section 2.2 (eps: its published training guide).
    """

    eps: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise ValueError(f"Linear: eps must lie in [0, 1), got {self.eps}")

    def p_mask(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * t + self.eps

    def slope(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 1 - self.eps)


@dataclass(frozen=True)
class Cosine(MaskSchedule):
    """MaskGIT's cosine schedule, p_mask(t) = sin(pi t / 2): 0.71 at t = 0.5.

    Source: arXiv:2202.04200, section 3.3, with t = 1 - r.
    """

    def p_mask(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def slope(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * torch.cos(0.5 * math.pi * t).clamp_min(0.0)  # pi / 2 is rounded up


@dataclass(frozen=True)
class Shifted(MaskSchedule):
    """p_mask(t) = shift t / (1 + (shift - 1) t): 0.75 at t = 0.5 with the default, 3.

    In sampling, above 1 few tokens are committed at first, and below 1 many; 1 is linear.
    Source: arXiv:2505.16839 (LaViDa), the time-step shift of arXiv:2403.03206, section 5.3.2.
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"Shifted: shift must be above 0, got {self.shift}")

    def p_mask(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def slope(self, t: Tensor) -> Tensor:
        return self.shift / (1 + (self.shift - 1) * t) ** 2

    def weight(self, t: Tensor) -> Tensor:
        """1 / (t (1 + (shift - 1) t)); written out, because p_mask underflows before t does."""
        return 1 / (t.clamp_min(torch.finfo(t.dtype).tiny) * (1 + (self.shift - 1) * t))
