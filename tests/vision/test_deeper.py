"""A tokenizer that grows in depth makes the same images, and learns on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from mmdlm.vision.tokenizers.patch_tokenizer import PatchTokenizer
from train.image_tokenizer import TokenizerConfig

SMALL = {"image_size": 16, "patch": 8, "width": 12, "heads": 2, "levels": [3, 3]}


def small() -> PatchTokenizer:
    torch.manual_seed(0)
    tokenizer = PatchTokenizer(**SMALL, encoder_depth=1, decoder_depth=1)
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return tokenizer


def test_deeper_makes_the_same_images(tmp_path: Path) -> None:
    before = small()
    before.save_pretrained(tmp_path)
    options = {"encoder_depth": 2, "decoder_depth": 3}
    after = TokenizerConfig(start_from=tmp_path, options=options).build()
    assert after.config == {**before.config, **options}
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(before.encode(pixels), after.encode(pixels))
    torch.testing.assert_close(before.reconstruct(pixels)[0], after.reconstruct(pixels)[0])
    after.reconstruct(pixels)[0].square().sum().backward()
    assert isinstance(after, PatchTokenizer)
    grown = after.decoder[2].attention_out.weight.grad
    assert grown is not None
    assert grown.abs().sum() > 0
    after.save_pretrained(tmp_path / "after")
    assert load_image_tokenizer(tmp_path / "after").config == after.config


def test_without_options_nothing_grows(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    assert TokenizerConfig(start_from=tmp_path).build().config == small().config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decoder_depth": 0}, "decoder_depth 0: blocks can be added to the 1"),
        ({"width": 24}, "only encoder_depth and decoder_depth of a PatchTokenizer can change"),
    ],
)
def test_what_cannot_grow(options: dict[str, int], said: str, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        TokenizerConfig(start_from=tmp_path, options=options).build()


def test_decoder_only_leaves_the_codes(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    options = {"decoder_depth": 2, "encoder_depth": 1}
    tokenizer = TokenizerConfig(start_from=tmp_path, options=options, decoder_only=True).build()
    frozen = {name for name, one in tokenizer.named_parameters() if not one.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {
        "encoder",
        "encoder_position",
        "patch_in",
        "to_latent",
    }
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode(pixels)
    optimizer = torch.optim.SGD([p for p in tokenizer.parameters() if p.requires_grad], lr=0.1)
    before = tokenizer.decode(codes).detach()
    tokenizer.reconstruct(pixels)[0].square().sum().backward()
    optimizer.step()
    assert torch.equal(tokenizer.encode(pixels), codes)
    assert not torch.equal(tokenizer.decode(codes), before)
    with pytest.raises(ValueError, match="decoder_only is true"):
        TokenizerConfig(decoder_only=True)
