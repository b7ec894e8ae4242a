"""The recipe of the image tokenizer: its loss by formula, and a run that stops and continues."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.shards.shards import write_shard
from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from mmdlm.vision.tokenizers.magvit2 import Magvit2Tokenizer
from mmdlm.vision.tokenizers.patch_tokenizer import PatchTokenizer
from tests.train.tiny import logged, settings, trajectory
from train.image_tokenizer import Images, PixelLoss, ReconstructionStage, TokenizerConfig, main
from train.optimizer import AdamW
from train.stages.meter import MEASURED, Load

SMALL = {"image_size": 16, "patch": 4, "width": 16, "heads": 2, "levels": [4, 4], "seam_width": 4}


@pytest.fixture
def images(tmp_path: Path) -> Images:
    """Twelve images of one color each, in two shards."""
    generator = np.random.default_rng(0)
    for shard in range(2):
        samples = []
        for number in range(6):
            file = io.BytesIO()
            color = tuple(generator.integers(0, 256, 3).tolist())
            Image.new("RGB", (16, 16), color).save(file, "PNG")
            samples.append({"__key__": f"{shard}{number}", "png": file.getvalue()})
        write_shard(tmp_path / "images" / f"{shard}.tar", samples)
    return Images(str(tmp_path / "images"), batch_size=4, shuffle_buffer=5)


def test_the_loss_by_hand() -> None:
    a, b = torch.randn(2, 2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    error = (a - b).double().numpy()
    across, down = np.diff(error, axis=3), np.diff(error, axis=2)
    expected = (
        2 * np.abs(error).mean()
        + 3 * np.square(error).mean()
        + 5 * (np.abs(across).mean() + np.abs(down).mean())
    )
    assert float(PixelLoss(l1=2, l2=3, gradient=5)(a, b)) == pytest.approx(expected, rel=1e-5)
    assert float(PixelLoss()(a, a)) == 0


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda: PatchTokenizer(**SMALL),
        lambda: Magvit2Tokenizer(
            ch=32, ch_mult=(1, 1), num_res_blocks=(1, 1), z_channels=4, resolution=16
        ),
    ],
    ids=["patch", "magvit2"],
)
def test_every_parameter_gets_a_gradient(tokenizer: Any) -> None:
    """A data-parallel wrapper would wait for one that does not."""
    stage = ReconstructionStage(tokenizer(), PixelLoss())
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert stage.counts(pixels, None).keys() == stage.coefficients.keys()
    sum(stage(pixels, None).values()).backward()
    assert [name for name, p in stage.named_parameters() if p.grad is None] == []


def test_the_operations_of_a_image_are_those_of_its_layers() -> None:
    tokenizer = PatchTokenizer(**SMALL)
    stage = ReconstructionStage(tokenizer, PixelLoss())
    found: list[int] = []

    def note(layer: Any, given: tuple[torch.Tensor], result: torch.Tensor) -> None:
        """Each output is a sum over the weights that lead to it."""
        found.append(2 * result.numel() * layer.weight[0].numel())

    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    for layer in [one for one in tokenizer.modules() if isinstance(one, kinds)]:
        layer.register_forward_hook(note)
    tokenizer.reconstruct(torch.zeros(1, 3, 16, 16))
    attention = len([*tokenizer.encoder, *tokenizer.decoder]) * 4 * 16 * 16 * 16
    expected = sum(found) + attention
    assert stage.image_flops == expected
    load = stage.load(torch.zeros(5, 3, 16, 16), None)
    assert (load.tokens, load.targets) == (5 * 16, 5 * 16)
    assert float(load.flops) == 15 * stage.image_flops


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [None, 2])
def test_a_run_that_dies_goes_on_as_if_it_had_not(
    num_workers: int | None, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(stage: ReconstructionStage, batch: torch.Tensor, noise: None) -> Load | None:
        steps.append(noise)
        if len(steps) == 5:
            raise KeyError
        return load(stage, batch, noise)

    steps, load = [], ReconstructionStage.load
    images = replace(images, num_workers=num_workers)
    monkeypatch.setattr("train.stages.meter._rate", lambda *_: 1e9)
    run = settings(max_steps=6, save_steps=3, sample_steps=6, ema=0.9, optimizer=AdamW())
    options: dict[str, Any] = {
        "model": TokenizerConfig(options=SMALL),
        "training": run,
        "threads": 1,
    }
    main(tmp_path / "whole", images, **options)
    with monkeypatch.context() as patch:
        patch.setattr(ReconstructionStage, "load", die)
        with pytest.raises(KeyError):
            main(tmp_path / "killed", images, **options)
    main(tmp_path / "killed", images, **options)
    assert trajectory(tmp_path / "killed") == trajectory(tmp_path / "whole")

    first, *_, last = logged(tmp_path / "whole")
    assert last["loss/pixels"] < first["loss/pixels"]
    assert set(MEASURED) <= set(last)
    assert last["tokens_per_second"] == last["target_tokens_per_second"] > 0
    assert last["mfu"] > 0
    one, other = (load_image_tokenizer(tmp_path / name / "final") for name in ("whole", "killed"))
    assert isinstance(one, PatchTokenizer)
    assert one.config == PatchTokenizer(**SMALL).config
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert (tmp_path / "whole" / "samples" / "step_00000006.png").is_file()


def test_it_starts_from_a_tokenizer(images: Images, tmp_path: Path) -> None:
    main(
        tmp_path / "a",
        images,
        model=TokenizerConfig(options=SMALL),
        training=settings(max_steps=1),
        threads=1,
    )
    still = settings(max_steps=1, max_grad_norm=1e-9)
    main(tmp_path / "b", images, model=TokenizerConfig(tmp_path / "a" / "final"), training=still)
    a, b = (load_image_tokenizer(tmp_path / name / "final").state_dict() for name in "ab")
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"family": "VQVAE"}, "'VQVAE' cannot be trained; choose PatchTokenizer or MAGVITv2"),
        ({"options": {"patchsize": 4}}, "unknown option 'patchsize'"),
        ({"options": {"image_size": 10, "patch": 4}}, "10 is not a multiple of patch 4"),
    ],
)
def test_what_it_refuses(options: Any, named: str, images: Images, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        main(tmp_path / "out", images, model=TokenizerConfig(**options))
