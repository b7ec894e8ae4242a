"""Which image of a gallery is nearest, by brute force and by chance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmdlm.rl.rewards.images.neighbors import first_alike, nearest_neighbors


def levels(count: int, *, seed: int = 0, size: int = 4) -> Tensor:
    """Random images of 8 bits, [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_every_image_is_nearest_to_itself() -> None:
    gallery = levels(30)
    found = nearest_neighbors(gallery, gallery, right=torch.arange(30), k=5)
    assert found.rank.tolist() == [0] * 30
    assert found.nearest[:, 0].tolist() == list(range(30))
    assert bool(found.within(1).all())


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_ranks_are_those_of_brute_force(chunk: int) -> None:
    images, gallery = levels(20, seed=1), levels(33)
    right = torch.arange(20)
    distance = torch.stack(
        [(image.double() - gallery.double()).square().flatten(1).sum(1) for image in images]
    )
    found = nearest_neighbors(images, gallery, right=right, k=5, chunk=chunk)
    expected = (distance < distance.gather(1, right[:, None])).sum(1)
    assert torch.equal(found.rank, expected)
    assert torch.equal(found.nearest, distance.argsort(1)[:, :5])


def test_noise_is_at_chance() -> None:
    images, gallery = levels(2000, seed=1), levels(50)
    right = torch.arange(2000) % 50
    shares = [
        float(nearest_neighbors(images, gallery, right=right).within(k).double().mean())
        for k in (1, 5)
    ]
    assert shares == pytest.approx([1 / 50, 5 / 50], abs=4 * math.sqrt(0.1 * 0.9 / 2000))


def test_images_that_are_alike_count_as_one() -> None:
    gallery = levels(6)
    gallery[1:5] = gallery[0]  # five alike, and one more
    image = gallery[:1].clone()
    for place in range(5):
        found = nearest_neighbors(image, gallery, right=torch.tensor([place]))
        assert found.rank.tolist() == [0]
        assert found.nearest.tolist() == [[0, 5]]
    other = nearest_neighbors(image, gallery, right=torch.tensor([5]))
    assert other.rank.tolist() == [1]


def test_a_tie_is_decided_for_the_right_one() -> None:
    gallery = torch.tensor([0, 2], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 4, 4)
    between = torch.ones(1, 3, 4, 4, dtype=torch.uint8)
    for right in (0, 1):
        found = nearest_neighbors(between, gallery, right=torch.tensor([right]))
        assert found.rank.tolist() == [0]
        assert found.nearest.tolist() == [[right, 1 - right]]


def test_one_level_of_one_pixel_decides() -> None:
    """At 64 x 64, where float32 would have rounded it away."""
    image = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    gallery = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    gallery[1, 0, 0, 0] = 1  # nearer by 255^2 - 254^2 of 8e8
    found = nearest_neighbors(image, gallery, right=torch.tensor([0]))
    assert found.rank.tolist() == [1]
    assert found.nearest.tolist() == [[1, 0]]


def test_the_margin_tells_good_from_better() -> None:
    """By its distances, against the definition; 1 at the image itself, 0 in the middle."""
    gallery = levels(12)
    right = torch.arange(12)
    for weight in (0.0, 0.2, 0.5, 0.8):
        blended = (1 - weight) * gallery.double() + weight * gallery.roll(1, dims=0).double()
        distance = torch.cdist(blended.flatten(1), gallery.double().flatten(1))
        own = distance.diagonal()
        other = distance.masked_fill(torch.eye(12, dtype=torch.bool), math.inf).amin(1)
        expected = (other - own) / torch.maximum(own, other)
        found = nearest_neighbors(blended, gallery.double(), right=right, chunk=5).margin
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert bool((found > 0).all()) == (weight < 0.5)
    assert nearest_neighbors(gallery, gallery, right=right).margin.tolist() == [1.0] * 12
    alone = nearest_neighbors(gallery[:1], gallery[1:2], right=torch.tensor([0]))
    assert alone.margin.tolist() == [0.0]


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="resize"):
        nearest_neighbors(levels(1, size=4), levels(1, size=8), right=torch.zeros(1).long())


def test_the_first_of_alike_images() -> None:
    gallery = levels(4)
    gallery[3] = gallery[1]
    assert first_alike(gallery).tolist() == [0, 1, 2, 1]
