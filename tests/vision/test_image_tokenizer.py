"""What every image tokenizer promises, and how checkpoints are stored and refused."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from mmdlm.vision.tokenizers.base import ImageTokenizer
from mmdlm.vision.tokenizers.magvit2 import Magvit2Tokenizer
from mmdlm.vision.tokenizers.patch_tokenizer import PatchTokenizer

SIZE = 16


def tiny_magvit2() -> ImageTokenizer:
    return Magvit2Tokenizer(
        ch=32, ch_mult=[1, 1, 2], num_res_blocks=[1, 2, 1], z_channels=5, resolution=SIZE
    )


def tiny_patches() -> ImageTokenizer:
    return PatchTokenizer(
        image_size=SIZE, patch=4, width=16, heads=2, decoder_depth=1, levels=(4, 3), seam_width=4
    )


def tiny_vq() -> ImageTokenizer:
    pytest.importorskip("diffusers")
    from mmdlm.vision.tokenizers.vq_model import VQModelTokenizer

    tokenizer = VQModelTokenizer.from_config(
        {
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "block_out_channels": [8, 8, 16],
            "norm_num_groups": 4,
            "latent_channels": 4,
            "num_vq_embeddings": 32,
            "sample_size": SIZE,
        }
    )
    # diffusers starts with all vectors close to zero, from where few are ever used
    torch.nn.init.normal_(tokenizer.model.quantize.embedding.weight)
    return tokenizer


@pytest.fixture(params=[tiny_magvit2, tiny_patches, tiny_vq])
def tokenizer(request: pytest.FixtureRequest) -> ImageTokenizer:
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture
def magvit2() -> ImageTokenizer:
    torch.manual_seed(0)
    return tiny_magvit2().eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    """[2, 3, SIZE, SIZE] smooth ramps in [-1, 1] that differ per channel and image."""
    ramp = torch.linspace(-1, 1, SIZE)
    first = torch.stack(
        [ramp.expand(SIZE, SIZE), ramp[:, None].expand(SIZE, SIZE), ramp * ramp[:, None]]
    )
    return torch.stack([first, -first.flip(0)])


def edit_config(folder: Path, edit: Callable[[dict], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, edit: Callable[[dict], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


class TestContract:
    def test_encode_gives_codes_of_the_codebook(self, tokenizer, pixels) -> None:
        codes = tokenizer.encode(pixels)
        cells = (SIZE // tokenizer.downsampling) ** 2
        assert codes.shape == (2, cells)
        assert codes.dtype == torch.int64
        assert 0 <= codes.min() <= codes.max() < tokenizer.codebook_size
        assert tokenizer.image_size == SIZE

    def test_decoding_the_codes_is_the_reconstruction(self, tokenizer, pixels) -> None:
        """`reconstruct`, which training sees, and encode -> decode, which users see, agree."""
        with torch.no_grad():
            trained, auxiliary = tokenizer.reconstruct(pixels)
            used = tokenizer.decode(tokenizer.encode(pixels))
        torch.testing.assert_close(used, trained, atol=1e-5, rtol=1e-5)
        assert used.shape == pixels.shape
        assert auxiliary.shape == ()

    def test_each_image_is_coded_alone(self, tokenizer, pixels) -> None:
        together = tokenizer.encode(pixels)
        alone = torch.cat([tokenizer.encode(image[None]) for image in pixels])
        assert torch.equal(together, alone)

    def test_gradient_reaches_every_parameter(self, tokenizer, pixels) -> None:
        reconstruction, auxiliary = tokenizer(pixels)
        ((reconstruction - pixels).square().mean() + auxiliary).backward()
        assert [n for n, p in tokenizer.named_parameters() if p.grad is None] == []

    @pytest.mark.slow
    def test_training_lowers_the_error(self, tokenizer, pixels) -> None:
        tokenizer.train()
        optimizer = torch.optim.Adam(tokenizer.parameters(), lr=2e-3)
        errors = []
        for _ in range(40):
            reconstruction, auxiliary = tokenizer(pixels)
            error = (reconstruction - pixels).square().mean()
            optimizer.zero_grad()
            (error + auxiliary).backward()
            optimizer.step()
            errors.append(error.item())
        assert sum(errors[-5:]) < 0.7 * sum(errors[:5])

    def test_pixels_that_are_not_images_are_refused(self, tokenizer, pixels) -> None:
        with pytest.raises(ValueError, match=r"\[N, 3, H, W\].*\[3, 16, 16\]"):
            tokenizer.encode(pixels[0])
        with pytest.raises(ValueError, match="uint8"):
            tokenizer.encode(pixels.to(torch.uint8))
        with pytest.raises(ValueError, match="16x15 pixels"):
            tokenizer.encode(pixels[..., :15])

    def test_codes_that_are_no_image_are_refused(self, tokenizer, pixels) -> None:
        codes = tokenizer.encode(pixels)
        with pytest.raises(ValueError, match="15 codes fill no square"):
            tokenizer.decode(codes[:, :15])
        with pytest.raises(ValueError, match="16 codes do not fill a grid of 3x5"):
            tokenizer.decode(codes, grid=(3, 5))
        with pytest.raises(ValueError, match=f"code {tokenizer.codebook_size} is not one of"):
            tokenizer.decode(torch.full_like(codes, tokenizer.codebook_size))
        with pytest.raises(ValueError, match="code -1 is not one of"):
            tokenizer.decode(torch.full_like(codes, -1))
        with pytest.raises(ValueError, match="float32"):
            tokenizer.decode(codes.float())


class TestCheckpoint:
    def test_save_and_load_give_the_same_tokenizer(self, tokenizer, pixels, tmp_path) -> None:
        folder = tmp_path / "new" / "image_tokenizer"
        tokenizer.save_pretrained(folder)
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.json",
            "digests.json",
            "model.safetensors",
        ]
        again = load_image_tokenizer(folder)
        assert type(again) is type(tokenizer)
        assert again.config == tokenizer.config
        assert not again.training
        for name, tensor in tokenizer.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(again.encode(pixels), tokenizer.encode(pixels))

    def test_config_names_a_family_and_no_class_path(self, tokenizer, tmp_path) -> None:
        tokenizer.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["_class_name"] == tokenizer.family
        assert "mmdlm" not in json.dumps(config)

    @pytest.mark.parametrize(
        "name", ["pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"]
    )
    def test_published_file_names_load(self, magvit2, tmp_path, name) -> None:
        magvit2.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / name)
        load_image_tokenizer(tmp_path)

    def test_missing_tensor(self, tokenizer, tmp_path) -> None:
        tokenizer.save_pretrained(tmp_path)
        name = next(iter(load_file(tmp_path / "model.safetensors")))
        edit_weights(tmp_path, lambda tensors: tensors.pop(name))
        with pytest.raises(ValueError, match=f"model.safetensors: tensor '{name}' is missing"):
            load_image_tokenizer(tmp_path)

    def test_unexpected_tensor(self, tokenizer, tmp_path) -> None:
        tokenizer.save_pretrained(tmp_path)
        edit_weights(
            tmp_path, lambda tensors: tensors.update(ghost=torch.zeros(1), spook=torch.ones(2))
        )
        with pytest.raises(ValueError, match="tensor 'ghost' and 1 more are not expected"):
            load_image_tokenizer(tmp_path)

    def test_misshapen_tensor(self, magvit2, tmp_path) -> None:
        magvit2.save_pretrained(tmp_path)
        edit_weights(tmp_path, lambda t: t.update({"encoder.quant_conv.bias": torch.zeros(7)}))
        with pytest.raises(
            ValueError, match=r"'encoder.quant_conv.bias' has shape \[7\] where \[5\] is needed"
        ):
            load_image_tokenizer(tmp_path)

    def test_truncated_weights(self, magvit2, tmp_path) -> None:
        magvit2.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"model.safetensors is damaged or truncated"):
            load_image_tokenizer(tmp_path)

    def test_missing_files(self, magvit2, tmp_path) -> None:
        with pytest.raises(ValueError, match=r"no folder .*nowhere.* check the path"):
            load_image_tokenizer(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"config.json is missing"):
            load_image_tokenizer(tmp_path)
        magvit2.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"holds no weights; one of model.safetensors"):
            load_image_tokenizer(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[1]", ""])
    def test_damaged_config(self, magvit2, tmp_path, text) -> None:
        magvit2.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json"):
            load_image_tokenizer(tmp_path)

    def test_unknown_family(self, magvit2, tmp_path) -> None:
        magvit2.save_pretrained(tmp_path)
        edit_config(tmp_path, lambda c: c.update(_class_name="os.system"))
        with pytest.raises(ValueError, match=r"unknown image tokenizer 'os.system'; known are"):
            load_image_tokenizer(tmp_path)

    def test_tensors_tell_the_family_where_the_config_does_not(self, tokenizer, tmp_path) -> None:
        tokenizer.save_pretrained(tmp_path)
        edit_config(tmp_path, lambda c: c.pop("_class_name"))
        if isinstance(tokenizer, PatchTokenizer):
            with pytest.raises(ValueError, match='names no family; add "_class_name"'):
                load_image_tokenizer(tmp_path)
        else:
            assert type(load_image_tokenizer(tmp_path)) is type(tokenizer)

    def test_another_family(self, magvit2, tmp_path) -> None:
        magvit2.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="describes a 'MAGVITv2', not a 'PatchTokenizer'"):
            PatchTokenizer.from_pretrained(tmp_path)

    def test_unknown_option(self, tokenizer, tmp_path) -> None:
        tokenizer.save_pretrained(tmp_path)
        edit_config(tmp_path, lambda c: c.update(chanels=3))
        with pytest.raises(ValueError, match=r"config.json: unknown option 'chanels'"):
            load_image_tokenizer(tmp_path)

    def test_options_that_make_no_sense(self, magvit2, tmp_path) -> None:
        magvit2.save_pretrained(tmp_path)
        for option in ({"ch": "wide"}, {"ch": 40}, {"num_res_blocks": [1]}, {"z_channels": 0}):
            edit_config(tmp_path, lambda c, option=option: c.update(magvit2.config | option))
            with pytest.raises(ValueError, match=r"config.json: "):
                load_image_tokenizer(tmp_path)


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFullDisk:
    def check_survival(self, folder: Path, before: dict[str, bytes]) -> None:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        load_image_tokenizer(folder)

    def test_previous_checkpoint_survives_a_failing_write(self, magvit2, tmp_path) -> None:
        magvit2.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        torch.nn.init.ones_(magvit2.encoder.quant_conv.bias)
        with (
            no_file_larger_than(10_000),
            pytest.raises(OSError, match=r"cannot save the image tokenizer to .* is intact; free"),
        ):
            magvit2.save_pretrained(tmp_path)
        self.check_survival(tmp_path, before)

    def test_previous_checkpoint_survives_a_failing_flush(
        self, magvit2, tmp_path, monkeypatch
    ) -> None:
        """Some file systems find room only when the data reach the disk."""
        magvit2.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        torch.nn.init.ones_(magvit2.encoder.quant_conv.bias)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device; what was saved"):
            magvit2.save_pretrained(tmp_path)
        self.check_survival(tmp_path, before)

    def test_a_file_in_the_way(self, magvit2, tmp_path) -> None:
        (tmp_path / "taken").write_text("")
        with pytest.raises(OSError, match=r"cannot save .*taken.* choose another folder"):
            magvit2.save_pretrained(tmp_path / "taken")


@pytest.mark.slow
def test_diffusers_is_not_imported_without_need() -> None:
    code = (
        "import sys, mmdlm.vision.tokenizers.base, mmdlm.vision.tokenizers.magvit2;"
        "import mmdlm.vision.tokenizers.vq_model;"
        "sys.exit('diffusers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
