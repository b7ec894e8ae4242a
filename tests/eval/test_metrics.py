"""What the numbers of a benchmark are, by formula, by brute force and by chance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eval.metrics import (
    PERFECT_PSNR,
    estimate,
    exact_match,
    first_alike,
    nearest_neighbours,
    psnr,
    wilson_interval,
    word_overlap,
)


def levels(count: int, *, seed: int = 0, size: int = 4) -> Tensor:
    """Random pictures of 8 bits, [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


# ---- averages


def test_the_error_of_a_share_is_binomial() -> None:
    hits = torch.arange(10) < 3
    found = estimate(hits)
    assert found.value == pytest.approx(0.3)
    assert found.count == 10
    assert found.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 9))


def test_the_standard_error_is_the_spread_of_means() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(2000, 50, generator=generator)
    claimed = torch.tensor([estimate(row).standard_error for row in samples]).mean()
    assert float(claimed) == pytest.approx(float(samples.mean(1).std()), rel=0.05)


def test_one_item_has_no_error_and_none_have_no_mean() -> None:
    assert math.isnan(estimate(torch.ones(1)).standard_error)
    with pytest.raises(ValueError, match=r"\[0\].*at least 1"):
        estimate(torch.ones(0))


@pytest.mark.parametrize("hits", [0, 1, 7, 10])
def test_the_interval_holds_the_share_and_is_never_a_point(hits: int) -> None:
    low, high = wilson_interval(torch.arange(10) < hits)
    assert 0 <= low <= hits / 10 <= high <= 1
    assert high - low > 0.2


def test_the_interval_solves_its_equation() -> None:
    """Its ends are the shares p with |p_hat - p| = z sqrt(p (1 - p) / n)."""
    for end in wilson_interval(torch.arange(40) < 25):
        assert abs(25 / 40 - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / 40))


# ---- texts


def test_any_of_the_right_names_is_exact_and_nothing_else() -> None:
    right = [{"Norway", "Bouvet Island"}] * 4
    found = exact_match(["Bouvet Island", "Norway", "norway", ""], right)
    assert found.tolist() == [True, True, False, False]


def test_predictions_and_names_must_pair_up() -> None:
    with pytest.raises(ValueError):  # noqa: PT011, the text is Python's
        exact_match(["one"], [])


@pytest.mark.parametrize(
    "text, value",
    [
        ("man cook dark skin tone", 1.0),
        ("dark cook man tone skin", 1.0),
        ("man cook", 2 * 2 / 7),
        ("man man man", 2 * 1 / 8),
        ("chef", 1.0),
        ("", 0.0),
    ],
)
def test_words_in_common(text: str, value: float) -> None:
    (found,) = word_overlap([text], [{"man cook dark skin tone", "chef"}])
    assert float(found) == pytest.approx(value)


# ---- pixels


def test_psnr_of_a_known_error() -> None:
    zeros = torch.zeros(2, 3, 4, 4)
    off = torch.tensor([0.1, 0.01])[:, None, None, None].expand_as(zeros)
    assert psnr(off, zeros).tolist() == pytest.approx([20 * math.log10(20), 20 * math.log10(200)])


def test_psnr_does_not_depend_on_the_range_once_it_is_named() -> None:
    one, other = levels(3), levels(3, seed=1)
    expected = psnr(one, other, peak=255)
    assert torch.allclose(psnr(one / 255, other / 255, peak=1.0), expected, atol=1e-4)
    assert torch.allclose(psnr(one / 127.5 - 1, other / 127.5 - 1), expected, atol=1e-4)


def test_psnr_of_equal_pictures_is_finite_and_the_most_there_is() -> None:
    assert psnr(levels(2), levels(2), peak=255).tolist() == [PERFECT_PSNR] * 2


def test_psnr_wants_one_size() -> None:
    with pytest.raises(ValueError, match="resize"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8))


# ---- neighbours


def test_every_picture_is_nearest_to_itself() -> None:
    gallery = levels(30)
    found = nearest_neighbours(gallery, gallery, right=torch.arange(30), k=5)
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
    found = nearest_neighbours(images, gallery, right=right, k=5, chunk=chunk)
    expected = (distance < distance.gather(1, right[:, None])).sum(1)
    assert torch.equal(found.rank, expected)
    assert torch.equal(found.nearest, distance.argsort(1)[:, :5])


def test_noise_is_at_chance() -> None:
    images, gallery = levels(2000, seed=1), levels(50)
    right = torch.arange(2000) % 50
    shares = [
        float(nearest_neighbours(images, gallery, right=right).within(k).double().mean())
        for k in (1, 5)
    ]
    assert shares == pytest.approx([1 / 50, 5 / 50], abs=4 * math.sqrt(0.1 * 0.9 / 2000))


def test_pictures_that_are_alike_count_as_one() -> None:
    gallery = levels(6)
    gallery[1:5] = gallery[0]  # five alike, and one more
    image = gallery[:1].clone()
    for place in range(5):
        found = nearest_neighbours(image, gallery, right=torch.tensor([place]))
        assert found.rank.tolist() == [0]
        assert found.nearest.tolist() == [[0, 5]]
    other = nearest_neighbours(image, gallery, right=torch.tensor([5]))
    assert other.rank.tolist() == [1]


def test_a_tie_is_decided_for_the_right_one() -> None:
    gallery = torch.tensor([0, 2], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 4, 4)
    between = torch.ones(1, 3, 4, 4, dtype=torch.uint8)
    for right in (0, 1):
        found = nearest_neighbours(between, gallery, right=torch.tensor([right]))
        assert found.rank.tolist() == [0]
        assert found.nearest.tolist() == [[right, 1 - right]]


def test_one_level_of_one_pixel_decides() -> None:
    """At 64 x 64, where float32 would have rounded it away."""
    image = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    gallery = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    gallery[1, 0, 0, 0] = 1  # nearer by 255^2 - 254^2 of 8e8
    found = nearest_neighbours(image, gallery, right=torch.tensor([0]))
    assert found.rank.tolist() == [1]
    assert found.nearest.tolist() == [[1, 0]]


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="resize"):
        nearest_neighbours(levels(1, size=4), levels(1, size=8), right=torch.zeros(1).long())


def test_the_first_of_alike_pictures() -> None:
    gallery = levels(4)
    gallery[3] = gallery[1]
    assert first_alike(gallery).tolist() == [0, 1, 2, 1]
