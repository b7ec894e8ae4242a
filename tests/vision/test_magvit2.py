"""MAGVIT-v2: its layout, its bits and its entropy. Parity is checked in tests/vectors."""

from __future__ import annotations

import math

import pytest
import torch

from mmdlm.vision.tokenizers.magvit2 import LookupFreeQuantizer, Magvit2Tokenizer


def tiny(**options) -> Magvit2Tokenizer:
    torch.manual_seed(0)
    options = {
        "ch": 32,
        "ch_mult": [1, 1, 1],
        "num_res_blocks": [1, 1, 1],
        "resolution": 16,
    } | options
    return Magvit2Tokenizer(**options).eval()


def test_defaults_are_the_published_tokenizer() -> None:
    """Parameter counts and number of tensors of showlab/magvitv2."""
    with torch.device("meta"):  # 95M parameters, none of them allocated
        tokenizer = Magvit2Tokenizer.from_config({"_class_name": "MAGVITv2"})
    assert sum(p.numel() for p in tokenizer.encoder.parameters()) == 55_439_171
    assert sum(p.numel() for p in tokenizer.decoder.parameters()) == 39_947_833
    assert len(tokenizer.state_dict()) == 382
    assert (tokenizer.codebook_size, tokenizer.downsampling, tokenizer.image_size) == (
        8192,
        16,
        256,
    )
    assert tokenizer.config["decoder_ch_mult"] == [1, 1, 2, 2, 4]
    assert tokenizer.config["decoder_num_res_blocks"] == [4, 4, 3, 4, 3]


def test_any_width_and_depth() -> None:
    tokenizer = tiny(
        ch_mult=[2, 1], num_res_blocks=[1, 2], decoder_ch_mult=[1, 3], decoder_num_res_blocks=[2, 1]
    )
    codes = tokenizer.encode(torch.zeros(1, 3, 16, 16))
    assert codes.shape == (1, 64)
    assert tokenizer.decode(codes).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "option, message",
    [
        ({"ch": 24}, "ch must be a positive multiple of 32, not 24"),
        ({"num_res_blocks": [1, 1]}, r"num_res_blocks must give one .* 3 levels .* not \[1, 1\]"),
        ({"decoder_ch_mult": [1, 0, 1]}, r"decoder_ch_mult .* not \[1, 0, 1\]"),
        ({"z_channels": 40}, "z_channels must be between 1 and 24 bits, not 40"),
        ({"in_ch": 1}, "in_ch and out_ch must be 3"),
        ({"resolution": 18}, "resolution must divide by 4, not 18"),
    ],
)
def test_options_that_make_no_sense_are_refused(option, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**option)


def test_codes_of_a_wide_image_need_its_grid() -> None:
    tokenizer = tiny()
    pixels = torch.rand(2, 3, 8, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(pixels)
    assert codes.shape == (2, 16)
    with torch.no_grad():
        wide = tokenizer.decode(codes, grid=(2, 8))
        expected, _ = tokenizer.reconstruct(pixels)
    torch.testing.assert_close(wide, expected, atol=1e-5, rtol=1e-5)
    assert tokenizer.decode(codes).shape == (2, 3, 16, 16)  # 16 codes could be a square, too


def test_codes_are_in_raster_order() -> None:
    tokenizer = tiny()
    pixels = torch.rand(1, 3, 8, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = tokenizer.encoder(pixels)  # [1, C, 2, 8]
    for row, column in ((0, 0), (0, 7), (1, 0), (1, 3)):
        bits = (z[0, :, row, column] > 0).long().tolist()
        code = int("".join(map(str, bits)), base=2)
        assert tokenizer.encode(pixels)[0, row * 8 + column] == code


class TestLookupFreeQuantizer:
    def test_the_first_channel_is_the_highest_bit(self) -> None:
        quantizer = LookupFreeQuantizer(4)
        z = torch.tensor([0.3, -0.1, -2.0, 0.0]).view(1, 4, 1, 1)
        assert quantizer.codes(z).item() == 0b1000  # zero counts as a zero bit

    def test_codes_and_bits_are_inverse(self) -> None:
        quantizer = LookupFreeQuantizer(6)
        codes = torch.arange(64).view(1, 8, 8)
        bits = quantizer.bits(codes)
        assert torch.equal(bits.abs(), torch.ones(1, 8, 8, 6))
        assert torch.equal(quantizer.codes(bits.permute(0, 3, 1, 2)), codes)

    def test_the_gradient_passes_straight_through(self) -> None:
        z = torch.tensor([0.3, -0.1]).view(1, 2, 1, 1).requires_grad_()
        signs = LookupFreeQuantizer(2)(z)
        assert signs.flatten().tolist() == [1, -1]
        (signs * torch.tensor([2.0, 5.0]).view(1, 2, 1, 1)).sum().backward()
        assert z.grad is not None
        assert z.grad.flatten().tolist() == [2, 5]

    def test_entropy_is_that_of_the_softmax_over_all_codes(self) -> None:
        quantizer = LookupFreeQuantizer(5)
        z = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0))
        flat = z.permute(0, 2, 3, 1).reshape(-1, 5)
        distance = (flat[:, None] - quantizer.embedding).square().sum(-1)  # [P, V]
        q = torch.softmax(-distance, dim=1)
        expected = torch.special.entr(q).sum(1).mean() - torch.special.entr(q.mean(0)).sum()
        torch.testing.assert_close(quantizer.entropy_penalty(z), expected)
        # bits taken apart know less of each other: an upper bound of the entropy, a lower penalty
        assert quantizer.entropy_penalty(z, group=2) <= expected + 1e-6

    def test_entropy_is_least_for_sure_codes_that_are_all_used(self) -> None:
        quantizer = LookupFreeQuantizer(4)
        every_code = 50 * quantizer.embedding.T.reshape(1, 4, 4, 4)
        one_code = torch.full((1, 4, 4, 4), 50.0)
        assert quantizer.entropy_penalty(every_code).item() == pytest.approx(-4 * math.log(2))
        assert quantizer.entropy_penalty(one_code).item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
    def test_entropy_has_finite_gradients(self, scale) -> None:
        z = torch.randn(1, 13, 2, 2, generator=torch.Generator().manual_seed(0)) * scale
        z.requires_grad_()
        LookupFreeQuantizer(13).entropy_penalty(z).backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()
