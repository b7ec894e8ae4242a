"""DiffusionBERT's forward process: informative tokens are masked early, frequent ones late."""

from __future__ import annotations

import math
import os
import pickle
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mmdlm.core.diffusion.forward import Corruption, FillingProcess, per_token
from mmdlm.core.diffusion.noise import (
    MaskNoise,
    Noise,
)
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class Spindle(FillingProcess):
    """DiffusionBERT's schedule: tokens that say much are masked early, frequent ones late.

        p_mask(t, v) = t + strength sin(pi t) h(v),    h(v) = 1 - H / H(v)

    where H(v) = -log f(v) is the information of token v, of relative frequency f(v) (one is added
    to every count), and H its mean over the corpus. Ids without a count have h = 0: p_mask = t.

    The weight of a token is its own p_mask' / p_mask. As it differs from token to token,
    `WeightedCrossEntropy` is no longer the bound, and teaches p(x_0 | x_t) times that weight;
    `SpindleBound` is the bound.

    Attributes:
        frequencies: File that data_pipelines.token_frequencies wrote: counts [V] of the text ids.
        strength: lambda; 0 is the linear schedule.

    Source: arXiv:2211.15029, section on the spindle noise schedule. Two departures: the mean is
    over the corpus and not over the sentence, so that what happens to a token follows only from
    the token; and h is limited to +-1 / (pi strength), beyond which p_mask would fall, too.
    """

    frequencies: str | os.PathLike[str]
    strength: float = 0.3

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ValueError(f"Spindle: strength must be 0 or more, got {self.strength}")

    @property
    def noise(self) -> Noise:
        return MaskNoise()

    def corrupt(
        self, batch: Batch, t: Tensor, vocabulary: Vocabulary, *, generator: torch.Generator
    ) -> Corruption:
        t = per_token(t, batch)
        bend = self._bend(vocabulary, t)[batch.ids]  # [B, L]
        p_mask = _bent(t, bend)
        draw = torch.rand(t.shape, generator=generator, device=t.device)
        is_noised = batch.target & (draw < p_mask)
        x_t = self._fill(batch, is_noised, p_mask, vocabulary, generator)
        slope, weight = _bent_slope(t, bend), _bent_weight(t, bend)
        return Corruption(
            x_t=x_t,
            is_noised=is_noised,
            loss_mask=is_noised,
            t=t,
            p_mask=p_mask,
            slope=slope,
            weight=weight,
        )

    def rates(self, t: Tensor, vocabulary: Vocabulary, *, ids: tuple[int, int]) -> Tensor:
        return _bent_weight(t[:, None], self._bend(vocabulary, t)[slice(*ids)])

    def _bend(self, vocabulary: Vocabulary, like: Tensor) -> Tensor:
        """Return strength h(v) of all ids, [V], in the dtype and on the device of `like`."""
        path = os.fspath(self.frequencies)
        return _bend(path, self.strength, vocabulary, like.device, like.dtype)


@lru_cache(maxsize=8)
def _bend(
    path: str, strength: float, vocabulary: Vocabulary, device: torch.device, dtype: torch.dtype
) -> Tensor:
    try:
        counts = torch.load(path, weights_only=True).double()
    except (OSError, EOFError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"frequencies {path} cannot be read ({reason}); write them with "
            "data_pipelines.token_frequencies"
        ) from error
    start, stop = vocabulary.text
    if counts.ndim != 1 or not 0 < len(counts) <= stop - start:
        raise ValueError(
            f"frequencies {path}: counts of shape {tuple(counts.shape)}, but the vocabulary has "
            f"{stop - start} text ids; count with the tokenizer of the model"
        )
    frequency = (counts + 1) / (counts + 1).sum()
    information = -frequency.log()
    mean = (frequency * information).sum()
    most = 1 / math.pi  # of strength * h, or p_mask would not rise
    bend = torch.zeros(vocabulary.size, dtype=torch.float64)
    bend[start : start + len(counts)] = (strength * (1 - mean / information)).clamp(-most, most)
    return bend.to(device=device, dtype=dtype)


def _bent(t: Tensor, bend: Tensor) -> Tensor:
    return (t + bend * torch.sin(math.pi * t)).clamp(0, 1)  # sin(pi) is not quite 0


def _bent_slope(t: Tensor, bend: Tensor) -> Tensor:
    return (1 + math.pi * bend * torch.cos(math.pi * t)).clamp_min(0)


def _bent_weight(t: Tensor, bend: Tensor) -> Tensor:
    return _bent_slope(t, bend) / _bent(t, bend).clamp_min(torch.finfo(t.dtype).tiny)
