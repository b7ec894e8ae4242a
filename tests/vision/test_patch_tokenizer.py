"""The patch tokenizer: its lattice of codes, and the one size of its images."""

from __future__ import annotations

import pytest
import torch

from mmdlm.vision.tokenizers.patch_tokenizer import FiniteScalarQuantizer, PatchTokenizer


def tiny(**options) -> PatchTokenizer:
    torch.manual_seed(0)
    options = {"image_size": 16, "patch": 4, "width": 16, "heads": 2, "levels": (4, 3)} | options
    return PatchTokenizer(**options).eval()


class TestFiniteScalarQuantizer:
    @pytest.mark.parametrize("levels", [(2,), (8, 8, 8, 6), (3, 4, 5)])
    def test_every_code_has_its_own_point_and_comes_back(self, levels) -> None:
        quantizer = FiniteScalarQuantizer(levels)
        codes = torch.arange(quantizer.codebook_size)
        points = quantizer.lookup(codes)  # [V, C]
        assert points.shape == (len(codes), len(levels))
        assert len(points.unique(dim=0)) == len(codes)
        assert (points.min(), points.max()) == (-1, 1)
        quantized, again = quantizer(torch.atanh(points.clamp(-0.999, 0.999)))
        assert torch.equal(again, codes)
        torch.testing.assert_close(quantized, points)

    def test_levels_are_evenly_spaced(self) -> None:
        quantizer = FiniteScalarQuantizer((5,))
        points = quantizer.lookup(torch.arange(5)).flatten()
        torch.testing.assert_close(points, torch.linspace(-1, 1, 5))

    def test_the_code_is_that_of_the_nearest_point(self) -> None:
        quantizer = FiniteScalarQuantizer((4, 3))
        latent = 2 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        quantized, codes = quantizer(latent)
        torch.testing.assert_close(quantized, quantizer.lookup(codes))
        every = quantizer.lookup(torch.arange(12))
        # in units of each channel's spacing, since channels are rounded one by one
        spacing = torch.tensor([2 / 3, 1.0])
        distance = ((latent.tanh()[:, None] - every) / spacing).square().sum(-1)
        assert torch.equal(distance.argmin(1), codes)

    def test_gradients_pass_the_rounding(self) -> None:
        latent = torch.tensor([[0.3, -0.2]], requires_grad=True)
        quantized, codes = FiniteScalarQuantizer((4, 3))(latent)
        quantized.sum().backward()
        assert latent.grad is not None
        # what is left is the gradient of tanh alone
        torch.testing.assert_close(latent.grad, 1 - latent.detach().tanh().square())
        assert not codes.requires_grad

    @pytest.mark.parametrize("levels", [(), (4, 1)])
    def test_fewer_than_two_levels_are_refused(self, levels) -> None:
        with pytest.raises(ValueError, match="at least 2"):
            FiniteScalarQuantizer(levels)


def test_defaults_fit_the_emoji_layout() -> None:
    """64 codes, as 8x8, for an image of 64x64 pixels."""
    tokenizer = PatchTokenizer()
    assert tokenizer.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 64)
    assert tokenizer.codebook_size == 8 * 8 * 8 * 6


def test_an_untrained_tokenizer_treats_cells_apart() -> None:
    """Fresh blocks mix nothing, so a changed patch changes its own code and its own pixels only."""
    tokenizer = tiny()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    other = pixels.clone()
    other[..., 4:8, 8:12] *= -1  # row 1, column 2 of 4x4 cells
    changed = tokenizer.encode(pixels) != tokenizer.encode(other)
    assert changed.flatten().nonzero().flatten().tolist() == [1 * 4 + 2]
    with torch.no_grad():
        difference = tokenizer.reconstruct(pixels)[0] != tokenizer.reconstruct(other)[0]
    difference = difference.any(1)[0]
    assert difference[4:8, 8:12].all()
    assert difference.sum() == 16


def test_other_sizes_and_grids_are_refused() -> None:
    tokenizer = tiny()
    with pytest.raises(ValueError, match="2x8 codes: this tokenizer makes images of 16x16"):
        tokenizer.encode(torch.zeros(1, 3, 8, 32))
    codes = torch.zeros(1, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="2x8 codes: this tokenizer makes images of 16x16"):
        tokenizer.decode(codes, grid=(2, 8))
    with pytest.raises(ValueError, match="3x3 codes: this tokenizer makes images of 16x16"):
        tokenizer.decode(codes[:, :9])


def test_a_patch_that_does_not_divide_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size 16 is not a multiple of patch 5"):
        tiny(patch=5)
