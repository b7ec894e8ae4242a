"""What stands at a position whose token was noised: the mask token, unless a user says else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.vocabulary import Vocabulary


class Noise(ABC):
    """Fills noised positions, for the forward process in training and for the sampler alike."""

    @abstractmethod
    def fill(
        self,
        x_0: Tensor,
        where: Tensor,
        *,
        p_mask: Tensor,
        modality: Tensor,
        vocabulary: Vocabulary,
        generator: torch.Generator,
    ) -> Tensor:
        """Return x_0 with noise at the positions `where`; all [B, L].

        Args:
            x_0: int64, clean ids.
            where: Bool, positions to noise.
            p_mask: How far the process has gone at each position; at 1 nothing of x_0 is left.
            modality: int64, whose range of ids a position's noise is drawn from.
            vocabulary: Ranges of ids, and the mask token.
            generator: Random numbers.

        Returns:
            int64, noisy ids.
        """


@dataclass(frozen=True)
class MaskNoise(Noise):
    """The mask token."""

    def fill(
        self,
        x_0: Tensor,
        where: Tensor,
        *,
        p_mask: Tensor,
        modality: Tensor,
        vocabulary: Vocabulary,
        generator: torch.Generator,
    ) -> Tensor:
        return x_0.masked_fill(where, vocabulary.mask_id)
