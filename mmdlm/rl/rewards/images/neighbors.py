"""Which images of a gallery an image looks most like, pixel by pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighbors:
    """Where the right image stands among all images of a gallery, nearest first.

    Source of the margin: Rousseeuw (1987), the silhouette of a point, with single images for
    clusters.

    Attributes:
        rank: [N] int64, how many distinct images of the gallery are strictly nearer than the right
            one: 0 where it is the nearest, or ties with it.
        nearest: [N, k] int64, places in the gallery of the k nearest; of alike images the first.
        margin: [N] float64 in [-1, 1], (other - right) / max(other, right) of the distances to the
            right image and to the nearest other one: 1 where the right one is met exactly, 0 where
            both are as near, below 0 where another is nearer. It tells a good image from a better
            one where the rank is 0 for both; 0 in a gallery of one image.
    """

    rank: Tensor
    nearest: Tensor
    margin: Tensor

    def within(self, k: int) -> Tensor:
        """[N] bool: the right image is among the k nearest."""
        return self.rank < k


@torch.no_grad()
def nearest_neighbors(
    images: Tensor, gallery: Tensor, *, right: Tensor, k: int = 5, chunk: int = 512
) -> Neighbors:
    """Rank the images of a gallery by their L2 distance to each image, pixel by pixel.

    Gallery images that are alike to the last bit count as one, whichever of them is `right`, and
    a tie is decided for the right one. Distances come from one matrix product,
    |a|^2 - 2 ab + |b|^2, in float64: for 8-bit levels every sum is then an exact integer, so that
    near ties are decided by pixels and not by rounding, as they would be in float32.

    Args:
        images: [N, ...] pixels, uint8 levels or floats.
        gallery: [G, ...] pixels of the same size and range.
        right: [N] place in the gallery of the image that each image should show.
        k: Nearest images to return of each.
        chunk: Images and gallery images that are compared at a time.

    Returns:
        Ranks, nearest places and margins of all images.
    """
    if images.shape[1:] != gallery.shape[1:]:
        raise ValueError(
            f"nearest_neighbors: images of {list(images.shape[1:])} against a gallery of "
            f"{list(gallery.shape[1:])}; resize one of them"
        )
    flat, images = gallery.flatten(1), images.flatten(1)
    first = first_alike(flat)
    places = first.unique()  # [U] of the distinct images
    column = torch.searchsorted(places, first[right])  # [N] the right image among them
    ranks, nearest, margins = [], [], []
    for some, wanted in zip(images.split(chunk), column.split(chunk), strict=True):
        distance = _squared_distances(some, flat, places, chunk)  # [n, U]
        of_right = distance.gather(1, wanted[:, None])
        ranks.append((distance < of_right).sum(1))
        margins.append(_margin(distance, of_right, wanted))
        # Nearer by the least there is: the right one comes first among equals.
        below = torch.nextafter(of_right, torch.full_like(of_right, -math.inf))
        distance = distance.scatter(1, wanted[:, None], below)
        order = distance.topk(min(k, len(places)), dim=1, largest=False, sorted=True).indices
        nearest.append(places[order])
    return Neighbors(rank=torch.cat(ranks), nearest=torch.cat(nearest), margin=torch.cat(margins))


def first_alike(images: Tensor) -> Tensor:
    """[G, ...] -> [G] int64: the place of the first image that is the same to the last bit."""
    seen: dict[bytes, int] = {}
    rows = images.flatten(1).contiguous().cpu().numpy()
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


def _margin(distance: Tensor, of_right: Tensor, wanted: Tensor) -> Tensor:
    """Squared distances [n, U] and [n, 1], columns [n] of the right ones -> [n] margins."""
    if distance.shape[1] == 1:
        return torch.zeros_like(of_right[:, 0])
    others = distance.scatter(1, wanted[:, None], math.inf).amin(1)
    right, other = of_right[:, 0].clamp_min(0).sqrt(), others.clamp_min(0).sqrt()
    return (other - right) / torch.maximum(other, right)  # images differ: one is not 0
