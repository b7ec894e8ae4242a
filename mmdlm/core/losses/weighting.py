"""Weights of the covered tokens in the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.diffusion.forward import Absorbing, Corruption, ForwardProcess
from mmdlm.core.diffusion.spindle import Spindle
from mmdlm.core.sequence import Batch


class Weighting(ABC):
    """How much each covered token counts: [B, L], which token losses find in `Tokens.weight`."""

    def check(self, process: ForwardProcess) -> None:
        """Raise ValueError where the weights have no meaning for a process; most have for any."""
        return

    @abstractmethod
    def __call__(self, batch: Batch, corruption: Corruption) -> Tensor:
        """[B, L]; only what stands at covered positions is used."""


@dataclass(frozen=True)
class Bound(Weighting):
    """p_mask'(t) / p_mask(t), of which weighted cross-entropy makes the negative ELBO."""

    def __call__(self, batch: Batch, corruption: Corruption) -> Tensor:
        return corruption.weight


@dataclass(frozen=True)
class ContextAdaptive(Weighting):
    """CART: a masked token counts as much as there are clean tokens near it.

        w(n) = 1/2 sum_i [i is clean] p (1 - p)^(|n - i| - 1)

    over the other tokens i of its document, context included. It takes the place of 1 / t.
    Source: arXiv:2508.15487, section on context-adaptive token-level noise rescheduling.
    """

    p: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"ContextAdaptive: p must lie in (0, 1], got {self.p}")

    def check(self, process: ForwardProcess) -> None:
        if not isinstance(process, Absorbing | Spindle):
            raise ValueError(
                f"ContextAdaptive counts clean tokens, which {type(process).__name__} does not "
                "tell from noise; take Absorbing"
            )

    def __call__(self, batch: Batch, corruption: Corruption) -> Tensor:
        clean = (~corruption.is_noised & ~batch.is_padding).to(corruption.weight.dtype)
        left = self._discounted(clean, batch.document)
        right = self._discounted(clean.flip(1), batch.document.flip(1)).flip(1)
        return 0.5 * self.p * (left + right)

    def _discounted(self, clean: Tensor, document: Tensor) -> Tensor:
        """[B, L] sum over tokens to the left, of one document, of (1 - p)^(distance - 1).

        In log2 L rounds, each of which doubles how far the sum reaches.
        """
        length, keep = clean.shape[1], 1 - self.p
        same = document[:, 1:] == document[:, :-1]
        total = F.pad(clean[:, :-1] * same, (1, 0))
        reach = 1
        while reach < length:
            same = document[:, reach:] == document[:, :-reach]
            total = total + keep**reach * F.pad(total[:, :-reach] * same, (reach, 0))
            reach *= 2
        return total
