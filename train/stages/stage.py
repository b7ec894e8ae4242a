"""What the training loop asks of a stage of training, and of its data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from train.optimizer import (
    NO_RATES,
    Rates,
)
from train.stages.meter import Load


class Stage(nn.Module, ABC):
    """What one stage of training computes on one batch; `fit` knows nothing else about it.

    The noise is drawn before the forward pass, so that the denominators of all processes and all
    accumulation steps are known when the first gradient is taken.
    """

    coefficients: Mapping[str, float]  # weight of each loss term

    def begin(self, step: int) -> None:
        """Told the 0-based step that comes next, before its noise is drawn."""
        return

    @abstractmethod
    def draw(self, batch: Any, *, generator: torch.Generator) -> Any:
        """All randomness of the step; no gradient."""

    @abstractmethod
    def counts(self, batch: Any, noise: Any) -> dict[str, Tensor]:
        """Denominator of each loss term, scalars."""

    @abstractmethod
    def forward(self, batch: Any, noise: Any) -> dict[str, Tensor]:
        """Sum of each loss term, scalars with gradient."""

    def load(self, batch: Any, noise: Any) -> Load | None:
        """Return the tokens and operations of a step on this batch; None: they are not counted."""
        return None

    def rates(self) -> Rates:
        """Peak learning rates of the parameters that do not learn at the optimizer's own."""
        return NO_RATES

    def statistics(self) -> dict[str, float]:
        """Return what else to log of the last step; all processes call it, the main one writes."""
        return {}

    @property
    def is_spent(self) -> bool:
        """Whether the run is to end here, before its last step: a budget of its own is used up."""
        return False

    def compile_layers(self) -> None:
        """Hand the repeated layers to torch.compile, where the stage has any."""


class Loader(Protocol):
    """An endless iterable of batches that can say where it is, and go there."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the batch that was yielded last."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch that followed that position."""
