"""Towers are filled from published folders, to the last tensor, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from mmdlm.vision.encoders.auto import build_tower
from mmdlm.vision.encoders.tower import Tower
from mmdlm.vision.encoders.tower_weights import load_tower

FIELDS = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 20}


def tower(**options: Any) -> Tower:
    config = {"model_type": "siglip_vision_model", **FIELDS, **options}
    return build_tower("transformers", config, -2).eval()


def published(kind: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind == "vision half":
            return SiglipVisionModel(SiglipVisionConfig(**FIELDS)).eval()
        text = {**TEXT, "num_attention_heads": 2, "projection_size": 8}
        return SiglipModel(SiglipConfig(text_config=text, vision_config=dict(FIELDS))).eval()


@pytest.mark.parametrize("kind", ["vision half", "whole model"])
def test_a_folder_of_transformers(kind: str, tmp_path: Path) -> None:
    """It sees as the published model does."""
    model = published(kind)
    model.save_pretrained(tmp_path)
    ours = tower()
    load_tower(ours, tmp_path)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    half: Any = model if kind == "vision half" else model.vision_model
    with torch.no_grad():
        expected = half(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(torch.stack(ours(list(pixels))), expected)


def test_the_head_is_read_where_the_tower_has_one(tmp_path: Path) -> None:
    published("vision half").save_pretrained(tmp_path)
    ours = tower(vision_use_head=True)
    load_tower(ours, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, value in ours.state_dict().items():
        theirs = next(stored[p + name] for p in ("", "vision_model.") if p + name in stored)
        assert torch.equal(value, theirs), name


def test_an_open_clip_folder(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    cfg = {"image_size": 8, "layers": 2, "width": 64, "head_width": 32, "patch_size": 4}
    config = {"embed_dim": 8, "vision_cfg": cfg}
    first, second = (build_tower("open_clip", config, -1) for _ in range(2))
    stored = {**first.state_dict(), "token_embedding.weight": torch.zeros(3, 3)}
    save_file(stored, tmp_path / "open_clip_model.safetensors")
    load_tower(second, tmp_path)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def changed(stored: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    name = next(one for one in stored if one.endswith("layers.1.mlp.fc1.bias"))
    match change:
        case "missing":
            del stored[name]
        case "shape":
            stored[name] = stored[name][:3].clone()
        case "beyond":
            stored[name.replace("layers.1", "layers.3")] = stored[name].clone()
    return stored


@pytest.mark.parametrize(
    "change, message",
    [
        ("missing", r"they lack encoder.layers.1.mlp.fc1.bias \(1 tensors\)"),
        (
            "shape",
            r"in another shape encoder.layers.1.mlp.fc1.bias \[3\], not \[12\] \(1 tensors\)",
        ),
        ("beyond", r"they have beyond it .*encoder.layers.3.mlp.fc1.bias \(1 tensors\)"),
    ],
)
def test_weights_that_do_not_fit(change: str, message: str, tmp_path: Path) -> None:
    published("vision half").save_pretrained(tmp_path / "good")
    stored = changed(load_file(tmp_path / "good" / "model.safetensors"), change)
    (tmp_path / "bad").mkdir()
    save_file(stored, tmp_path / "bad" / "model.safetensors")
    ours = tower()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_tower(ours, tmp_path / "bad")
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


def test_no_weights_and_damaged_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no safetensors files"):
        load_tower(tower(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        load_tower(tower(), tmp_path)
