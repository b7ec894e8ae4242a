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
    psnr,
    wilson_interval,
    word_overlap,
)


def levels(count: int, *, seed: int = 0, size: int = 4) -> Tensor:
    """Random images of 8 bits, [count, 3, size, size]."""
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


def test_psnr_of_equal_images_is_finite_and_the_most_there_is() -> None:
    assert psnr(levels(2), levels(2), peak=255).tolist() == [PERFECT_PSNR] * 2


def test_psnr_wants_one_size() -> None:
    with pytest.raises(ValueError, match="resize"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8))
