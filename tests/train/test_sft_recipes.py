"""Each recipe of configs/sft on a tiny random model of its family, in three steps."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from data_pipelines.shards.shards import Sample, write_shard
from data_pipelines.sources.source import encode_array
from mmdlm.cli.recipe import run
from tests.train.tiny import logged
from train.sft import main

CONFIGS = Path(__file__).parents[2] / "configs" / "sft"
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SHORT = {"batch_size": 1, "length": 512, "num_workers": 0, "shuffle_buffer": 4}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision tower as transformers has it."""
    folder = tmp_path_factory.mktemp("siglip")
    options = {name: value for name, value in TOWER.items() if name != "model_type"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SiglipVisionModel(SiglipVisionConfig(**options)).save_pretrained(folder)
    return folder


def conversation(question: str, answer: str, **fields: Any) -> Sample:
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"__key__": "0", "json": json.dumps({"messages": messages}).encode(), **fields}


def shards(folder: Path, sample: Sample) -> str:
    folder.mkdir(parents=True)
    samples = [{**sample, "__key__": str(n)} for n in range(4)]
    write_shard(folder / "000000.tar", samples)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Shards of words, of images that are seen as pixels or as codes, and of drawings."""
    file = io.BytesIO()
    Image.new("RGB", (40, 28), "red").save(file, format="PNG")
    image = {"png": file.getvalue()}
    codes = {"codes.npy": encode_array(np.arange(16, dtype=np.uint16))}
    thought = "<think> hm </think> red"
    return {
        "words": shards(tmp_path / "words", conversation("which?", thought)),
        "pixels": shards(tmp_path / "pixels", conversation("<image> which?", "red", **image)),
        "codes": shards(tmp_path / "codes", conversation("<image> which?", thought, **codes)),
        "drawn": shards(tmp_path / "drawn", conversation("red", "<image>", **codes)),
    }


def small(recipe: dict[str, Any], start: Path, urls: list[str], out: Path) -> dict[str, Any]:
    """The recipe on other files, with a small tower, for three steps."""
    sources = [
        {**source, "urls": url} for source, url in zip(recipe["data"]["sources"], urls, strict=True)
    ]
    recipe |= {"out": str(out), "threads": 1}
    model = recipe["model"]
    model |= {"start_from": str(start), "dtype": "float32"}
    recipe["data"] |= {**SHORT, "sources": sources}
    recipe["training"] |= {"max_steps": 3, "gradient_accumulation_steps": 1, "logging_steps": 1}
    if "lora" in model:
        model["lora"]["rank"] = 2
    if "vision" in model:
        model["vision"] |= {"tower": TOWER}
        model["vision"]["tiling"]["init_args"] |= {"size": 28, "grid": 2}
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "kinds"),
    [
        ("llada_s1k", "llada", ["words"]),
        ("llada_qlora_24gb", "llada", ["words"]),
        ("llava_llada_v_projector", "llada", ["pixels"]),
        ("mmada_cot", "mmada", ["drawn", "words", "codes"]),
    ],
)
def test_it_runs(
    name: str,
    family: str,
    kinds: list[str],
    models: Path,
    siglip: Path,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    urls = [data[kind] for kind in kinds]
    recipe = small(recipe, models / family, urls, tmp_path / "run")
    if "quantization" in recipe["model"]:
        pytest.importorskip("torchao")
        recipe["model"]["quantization"] = "int8"  # on any CPU, at any width
    if "vision_tower_weights" in recipe["model"]:
        recipe["model"]["vision_tower_weights"] = str(siglip)
    train(recipe, tmp_path, monkeypatch)
    if name != "llava_llada_v_projector":
        return
    # The second stage goes on from the first, with images cut into mosaics.
    recipe = yaml.safe_load((CONFIGS / "llava_llada_v.yaml").read_text())
    recipe = small(recipe, tmp_path / "run" / "final", urls, tmp_path / "second")
    recipe["model"]["attention"] = "sdpa"
    train(recipe, tmp_path, monkeypatch)


def train(recipe: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", ["sft", "--config", str(path)])
    run(main)
    out = Path(recipe["out"])
    assert [entry["step"] for entry in logged(out)] == [1, 2, 3]
    assert all(entry["grad_norm"] > 0 for entry in logged(out))
    weights = "final/model.safetensors"
    if "quantization" in recipe["model"]:
        weights = "adapter/adapter_model.safetensors"
    assert (out / weights).is_file()


def test_every_recipe_is_run() -> None:
    """Those above, the smoke runs, what `make rl` starts from, and test_chat.py."""
    ran = {"llada_s1k", "llada_qlora_24gb", "llava_llada_v", "llava_llada_v_projector", "mmada_cot"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} - ran == {
        "smoke",
        "sudoku",
        "countdown",
        "chat",
    }
