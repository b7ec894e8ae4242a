"""Mask schedules: powers of time (MD4), and the log-linear one of SEDD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.diffusion.schedule import MaskSchedule


@dataclass(frozen=True)
class Polynomial(MaskSchedule):
    """p_mask(t) = t ** power. Source: arXiv:2406.04329, section 3 (polynomial schedules of MD4)."""

    power: float = 2.0

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise ValueError(f"Polynomial: power must be above 0, got {self.power}")

    def p_mask(self, t: Tensor) -> Tensor:
        return t**self.power

    def slope(self, t: Tensor) -> Tensor:
        tiny = torch.finfo(t.dtype).tiny  # a power below 1 is vertical at 0
        return self.power * t.clamp_min(tiny) ** (self.power - 1)

    def weight(self, t: Tensor) -> Tensor:
        """Return power / t, written out because t ** power underflows long before t does."""
        tiny = max(self.power, 1.0) * torch.finfo(t.dtype).tiny  # power / tiny may overflow
        return self.power / t.clamp_min(tiny)


@dataclass(frozen=True)
class LogLinear(MaskSchedule):
    """p_mask(t) = 1 - exp(-sigma(t)) with sigma(t) = -log(1 - (1 - eps) t), that is (1 - eps) t.

    The total noise sigma stays finite: a share eps of the tokens is clean even at t = 1.
    Source: arXiv:2310.16834, section 5.1.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise ValueError(f"LogLinear: eps must lie in [0, 1), got {self.eps}")

    def p_mask(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * t

    def slope(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 1 - self.eps)
