"""Uniform diffusion: a noised token becomes any token (D3PM)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdlm.core.diffusion.forward import Corruption, TokenNoising
from mmdlm.core.diffusion.noise import Noise
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import GENERATED, Vocabulary


@dataclass(frozen=True)
class UniformNoise(Noise):
    """Any id of the range of the position's modality, all equally likely, whatever x_0 was."""

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
        u = torch.rand(x_0.shape, generator=generator, device=x_0.device, dtype=torch.float64)
        x_t = x_0
        for kind in GENERATED:
            start, stop = vocabulary.range(kind)
            drawn = start + (u * (stop - start)).long()
            x_t = torch.where(where & (modality == kind), drawn, x_t)
        return x_t


@dataclass(frozen=True)
class Uniform(TokenNoising):
    """Noised tokens become any token of their modality, by chance the same one.

    By default the loss covers the noised positions: a noised token says nothing of x_0, so there
    the network learns p(x_0 | all other tokens), which is what the sampler asks for at open
    positions. Weighted cross-entropy is then a reweighted x_0-prediction loss, not the bound.

    With `cover_all` the loss covers every target, noised or not: what `UniformScoreEntropy`, which
    is the bound, needs, and D3PM's auxiliary loss.

    Source: arXiv:2107.03006, section 3.1 (uniform) and 3.4 (auxiliary loss).
    """

    cover_all: bool = False

    @property
    def noise(self) -> Noise:
        return UniformNoise()

    def corrupt(
        self, batch: Batch, t: Tensor, vocabulary: Vocabulary, *, generator: torch.Generator
    ) -> Corruption:
        corruption = super().corrupt(batch, t, vocabulary, generator=generator)
        return replace(corruption, loss_mask=batch.target) if self.cover_all else corruption

    def complement(
        self,
        batch: Batch,
        corruption: Corruption,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
    ) -> Corruption:
        if self.cover_all:
            raise ValueError("Uniform: complementary masks need cover_all=False")
        return super().complement(batch, corruption, vocabulary, generator=generator)
