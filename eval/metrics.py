"""Pure metrics: from images, texts and numbers to numbers; no model, no data set, no files."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.rl.rewards.images.round_trip import word_f1

PERFECT_PSNR = 100.0  # dB, in place of infinity


# ---- averages -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over items.

    Attributes:
        value: The mean.
        standard_error: Of it, as the items are a sample of all that could have been asked: the
            standard deviation over sqrt(count); for hits and misses this is the binomial one.
        count: Number of items.
    """

    value: float
    standard_error: float
    count: int


def estimate(values: Tensor) -> Estimate:
    """Return the mean of [N] numbers, or of hits and misses (bool), with its standard error.

    A single item has no spread, so its error is NaN; only hits or only misses have none either,
    and 0 flatters them: see `wilson_interval`. Raises ValueError where there is nothing to average.
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"estimate: values of shape {list(values.shape)}; give [N], N at least 1")
    values = values.double()
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(values.mean()), error, count)


def wilson_interval(hits: Tensor, *, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share, from [N] hits and misses; z = 1.96 covers 95 %.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n). It stays honest at 0 and
    100 %, where the standard error is 0. Source: Wilson, J. Am. Stat. Assoc. 22 (1927) 209.
    """
    found = estimate(hits)
    n, p = found.count, found.value
    middle = p + z**2 / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


# ---- texts --------------------------------------------------------------------------------------


def exact_match(predictions: Sequence[str], right: Sequence[Collection[str]]) -> Tensor:
    """[N] texts and the texts that are right for each -> [N] bool; nothing is normalized."""
    return torch.tensor(
        [text in names for text, names in zip(predictions, right, strict=True)], dtype=torch.bool
    )


def word_overlap(predictions: Sequence[str], right: Sequence[Collection[str]]) -> Tensor:
    """[N] texts and the texts that are right for each -> [N] F1 of their words, in [0, 1].

    Words are what spaces separate, counted as often as they occur; the best of the right texts
    counts. Order does not matter: 1 is not yet an exact match.
    """
    return torch.tensor(
        [
            max(word_f1(text, name) for name in names)
            for text, names in zip(predictions, right, strict=True)
        ],
        dtype=torch.float64,
    )


# ---- images -----------------------------------------------------------------------------------


def psnr(images: Tensor, references: Tensor, *, peak: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each image: [N, ...], [N, ...] -> [N] dB, float64.

    10 log10(peak^2 / mean squared error), over all pixels and channels of one image. `peak` is
    the width of the pixels' range: 2 for [-1, 1], 1 for [0, 1], 255 for 8 bits. Nothing is clamped.
    Equal images get `PERFECT_PSNR`, which is also the most there is, so that a mean stays finite.
    """
    if images.shape != references.shape:
        raise ValueError(
            f"psnr: pixels {list(images.shape)} against {list(references.shape)}; "
            "resize one of them"
        )
    squared = (images.double() - references.double()).flatten(1).square().mean(1)
    return (10 * torch.log10(peak**2 / squared)).clamp_max(PERFECT_PSNR)
