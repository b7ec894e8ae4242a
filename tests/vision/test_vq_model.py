"""diffusers' VQModel behind our contract."""

from __future__ import annotations

import sys

import pytest
import torch

from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from mmdlm.vision.tokenizers.vq_model import VQModelTokenizer

OPTIONS = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "latent_channels": 4,
    "num_vq_embeddings": 32,
    "sample_size": 16,
}


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture
def model(diffusers):
    torch.manual_seed(0)
    model = diffusers.VQModel(**OPTIONS).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_checkpoint_of_diffusers_gives_its_images(model, pixels, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    tokenizer = load_image_tokenizer(tmp_path)
    assert isinstance(tokenizer, VQModelTokenizer)
    assert (tokenizer.codebook_size, tokenizer.image_size, tokenizer.downsampling) == (32, 16, 2)
    with torch.no_grad():
        expected = model(pixels)
        reconstruction, auxiliary = tokenizer.reconstruct(pixels)
        decoded = tokenizer.decode(tokenizer.encode(pixels), grid=(8, 12))
    torch.testing.assert_close(reconstruction, expected.sample)
    torch.testing.assert_close(decoded, expected.sample, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(auxiliary, expected.commit_loss)


def test_diffusers_loads_what_is_saved(diffusers, model, pixels, tmp_path) -> None:
    VQModelTokenizer(model).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "diffusion_pytorch_model.safetensors")
    again = diffusers.VQModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(pixels).sample, model(pixels).sample)


def test_spatial_norm_sees_the_codes(diffusers, pixels) -> None:
    torch.manual_seed(0)
    options = {"norm_type": "spatial", "block_out_channels": [32, 32], "norm_num_groups": 32}
    tokenizer = VQModelTokenizer.from_config(OPTIONS | options).eval()
    with torch.no_grad():
        expected = tokenizer.model(pixels).sample
        decoded = tokenizer.decode(tokenizer.encode(pixels), grid=(8, 12))
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)


def test_amused_sees_pixels_from_0_to_1(diffusers, pixels) -> None:
    torch.manual_seed(0)
    tokenizer = VQModelTokenizer.from_config(OPTIONS | {"lookup_from_codebook": True}).eval()
    torch.nn.init.normal_(tokenizer.model.quantize.embedding.weight)
    with torch.no_grad():
        expected = tokenizer.model((pixels + 1) / 2).sample * 2 - 1
        decoded = tokenizer.decode(tokenizer.encode(pixels), grid=(8, 12))
        reconstruction, _ = tokenizer.reconstruct(pixels)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reconstruction, expected, atol=1e-5, rtol=1e-5)


def test_images_must_be_rgb(diffusers) -> None:
    with pytest.raises(ValueError, match=r"in_channels must be 3 \(RGB\), not 4"):
        VQModelTokenizer.from_config(OPTIONS | {"in_channels": 4})


def test_without_diffusers_the_fix_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"needs diffusers; install it with: pip install"):
        VQModelTokenizer.from_config(OPTIONS)
