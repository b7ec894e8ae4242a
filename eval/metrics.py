"""Pure metrics: from pictures, texts and numbers to numbers; no model, no data set, no files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PERFECT_PSNR = 100.0  # dB, in place of infinity


# ---- averages -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over items.

    value           the mean
    standard_error  of it, as the items are a sample of all that could have been asked: the standard
                    deviation over sqrt(count); for hits and misses this is the binomial one
    count           number of items
    """

    value: float
    standard_error: float
    count: int


def estimate(values: Tensor) -> Estimate:
    """The mean of [N] numbers, or of hits and misses (bool), with its standard error.

    One item alone has no spread, so its error is NaN; hits alone or misses alone have none either,
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
    """[N] texts and the texts that are right for each -> [N] bool; nothing is normalised."""
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
            max(_word_f1(text, name) for name in names)
            for text, names in zip(predictions, right, strict=True)
        ],
        dtype=torch.float64,
    )


def _word_f1(one: str, other: str) -> float:
    words, others = Counter(one.split()), Counter(other.split())
    total = words.total() + others.total()
    return 2 * (words & others).total() / total if total else 1.0


# ---- pictures -----------------------------------------------------------------------------------


def psnr(pictures: Tensor, references: Tensor, *, peak: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each picture: [N, ...], [N, ...] -> [N] dB, float64.

    10 log10(peak^2 / mean squared error), over all pixels and channels of one picture. `peak` is
    the width of the pixels' range: 2 for [-1, 1], 1 for [0, 1], 255 for 8 bits. Nothing is clamped.
    Equal pictures get `PERFECT_PSNR`, which is also the most there is, so that a mean stays finite.
    """
    if pictures.shape != references.shape:
        raise ValueError(
            f"psnr: pixels {list(pictures.shape)} against {list(references.shape)}; "
            "resize one of them"
        )
    squared = (pictures.double() - references.double()).flatten(1).square().mean(1)
    return (10 * torch.log10(peak**2 / squared)).clamp_max(PERFECT_PSNR)


@dataclass(frozen=True)
class Neighbours:
    """Where the right picture stands among all pictures of a gallery, nearest first.

    rank     [N] int64, how many distinct pictures of the gallery are strictly nearer than the right
             one: 0 where it is the nearest, or ties with it
    nearest  [N, k] int64, places in the gallery of the k nearest; of alike pictures the first
    """

    rank: Tensor
    nearest: Tensor

    def within(self, k: int) -> Tensor:
        """[N] bool: the right picture is among the k nearest."""
        return self.rank < k


@torch.no_grad()
def nearest_neighbours(
    images: Tensor, gallery: Tensor, *, right: Tensor, k: int = 5, chunk: int = 512
) -> Neighbours:
    """Rank the pictures of a gallery by their L2 distance to each image, pixel by pixel.

    images   [N, ...] pixels, uint8 levels or floats
    gallery  [G, ...] pixels of the same size and range
    right    [N] place in the gallery of the picture that each image should show
    chunk    images and gallery pictures that are compared at a time

    Gallery pictures that are alike to the last bit count as one, whichever of them is `right`, and
    a tie is decided for the right one. Distances come from one matrix product,
    |a|^2 - 2 ab + |b|^2, in float64: for 8-bit levels every sum is then an exact integer, so that
    near ties are decided by pixels and not by rounding, as they would be in float32.
    """
    if images.shape[1:] != gallery.shape[1:]:
        raise ValueError(
            f"nearest_neighbours: images of {list(images.shape[1:])} against a gallery of "
            f"{list(gallery.shape[1:])}; resize one of them"
        )
    flat, images = gallery.flatten(1), images.flatten(1)
    first = first_alike(flat)
    places = first.unique()  # [U] of the distinct pictures
    column = torch.searchsorted(places, first[right])  # [N] the right picture among them
    ranks, nearest = [], []
    for some, wanted in zip(images.split(chunk), column.split(chunk), strict=True):
        distance = _squared_distances(some, flat, places, chunk)  # [n, U]
        of_right = distance.gather(1, wanted[:, None])
        ranks.append((distance < of_right).sum(1))
        # Nearer by the least there is: the right one comes first among equals.
        below = torch.nextafter(of_right, torch.full_like(of_right, -math.inf))
        distance = distance.scatter(1, wanted[:, None], below)
        order = distance.topk(min(k, len(places)), dim=1, largest=False, sorted=True).indices
        nearest.append(places[order])
    return Neighbours(rank=torch.cat(ranks), nearest=torch.cat(nearest))


def first_alike(pictures: Tensor) -> Tensor:
    """[G, ...] -> [G] int64: the place of the first picture that is the same to the last bit."""
    seen: dict[bytes, int] = {}
    rows = pictures.flatten(1).contiguous().cpu().numpy()
    return torch.tensor([seen.setdefault(row.tobytes(), i) for i, row in enumerate(rows)])


def _squared_distances(images: Tensor, gallery: Tensor, places: Tensor, chunk: int) -> Tensor:
    """[n, P] images, [G, P] gallery, [U] places in it -> [n, U] float64."""
    images = images.double()
    own = images.square().sum(1, keepdim=True)  # [n, 1]
    columns = []
    for some in places.split(chunk):
        others = gallery[some].double()
        columns.append(own - 2 * images @ others.T + others.square().sum(1))
    return torch.cat(columns, dim=1)
