"""The recipe of the bundled model at a small shape: it captions, answers and edits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mmdlm
from data_pipelines.shards.shards import write_shard
from data_pipelines.sources.emoji_tasks import IMAGE, Task, samples_of
from data_pipelines.sources.source import png_bytes
from data_pipelines.text_tokenizer import main as text_tokenizer
from data_pipelines.tokenize_images import main as tokenize_images
from mmdlm.vision.pixels import to_image, to_pixels
from mmdlm.vision.tokenizers.base import ImageTokenizer
from mmdlm.vision.tokenizers.patch_tokenizer import PatchTokenizer
from tests.train.tiny import Run, pretrain

ROOT = Path(__file__).parents[2]
COLORS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 200)}


def images() -> dict[str, Image.Image]:
    """Two shapes in three colors, on white."""
    made = {}
    for name, color in COLORS.items():
        for shape in ("bar", "square"):
            pixels = np.full((32, 32, 3), 255, np.uint8)
            pixels[(8 if shape == "square" else 13) : (24 if shape == "square" else 19), 8:24] = (
                color
            )
            made[f"{name} {shape}"] = Image.fromarray(pixels)
    return made


def tasks() -> list[Task]:
    """Edits of the color, and questions about it."""
    made = []
    for name in images():
        color, shape = name.split()
        made.append(Task("question/color", (name,), (f"{IMAGE} which color?", color)))
        for other in COLORS:
            if other != color:
                turns = (f"{IMAGE} make it {other}", IMAGE)
                made.append(Task("edit/color", (name, f"{other} {shape}"), turns))
    return made


def nearest(image: Image.Image, tokenizer: ImageTokenizer) -> str:
    """The name of the known image that the tokenizer renders most like it."""
    pixels = np.asarray(image, np.float32)

    def distance(name: str) -> float:
        with torch.no_grad():
            again = to_image(tokenizer.reconstruct(to_pixels(images()[name])[None])[0][0])
        return float(np.square(pixels - np.asarray(again)).mean())

    return min(images(), key=distance)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """configs/pretrain/emoji_styles.yaml, with its data, for a model of 60,000 weights."""
    png = {name: png_bytes(image) for name, image in images().items()}
    captioned = (
        {
            "__key__": name.replace(" ", "-"),
            "png": data,
            "txt": name.encode(),
            "json": json.dumps({"sampling_weight": 1.0}).encode(),
        }
        for name, data in png.items()
    )
    urls = [str(tmp_path / "images" / name) for name in ("train", "tasks/train")]
    for url, samples in zip(urls, (captioned, samples_of(tasks(), png)), strict=True):
        Path(url).mkdir(parents=True)
        write_shard(Path(url) / "000000.tar", samples)
    text_tokenizer(urls, tmp_path / "words", size=300)
    torch.manual_seed(0)
    PatchTokenizer(
        image_size=32, patch=16, width=16, heads=2, decoder_depth=1, levels=[5, 5]
    ).save_pretrained(tmp_path / "tokenizer")
    for name, url in zip(("train", "tasks/train"), urls, strict=True):
        tokenize_images(url, tmp_path / "tokenizer", tmp_path / "codes" / name)
    config: dict[str, Any] = yaml.safe_load(
        (ROOT / "configs/pretrain/emoji_styles.yaml").read_text()
    )
    config["model"] |= {
        "text_tokenizer": str(tmp_path / "words"),
        "image_tokenizer": str(tmp_path / "tokenizer"),
    }
    config["model"]["shape"] |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "text_slots": 6,
    }
    pairs, talks = config["data"]["sources"]
    pairs |= {"urls": str(tmp_path / "codes/train")}
    talks |= {"urls": str(tmp_path / "codes/tasks/train"), "weight": 0.7}
    pairs["to_sequence"]["init_args"]["text_slots"] = 6
    talks["to_sequence"]["init_args"]["tail"]["init_args"]["longest"] = 2
    config["data"] |= {"length": 64, "batch_size": 8}
    training = {"max_steps": 300, "mixed_precision": "no", "compile": False, "sample_steps": 0}
    config["training"] |= {**training, "save_steps": 1000}
    del config["prompts"]
    return {**config, "out": str(tmp_path / "run"), "threads": 1}


@pytest.mark.slow
def test_it_learns_every_task(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert Run(pretrain, ["--config", str(path)], folder=tmp_path).exit_code() == 0
    model = mmdlm.load(tmp_path / "run" / "final", device="cpu")
    known = images()
    assert [model.caption(image) for image in known.values()] == list(known)
    edits = [task for task in tasks() if task.kind == "edit/color"]
    asked = [task.turns[0].removeprefix(f"{IMAGE} ") for task in edits]
    made = [
        model.edit(known[task.images[0]], text) for task, text in zip(edits, asked, strict=True)
    ]
    tokenizer = model.image_tokenizer
    assert tokenizer is not None
    assert [nearest(image, tokenizer) for image in made] == [task.images[1] for task in edits]
    answers = [model.answer("which color?", image, max_new_tokens=4) for image in known.values()]
    assert answers == [name.split()[0] for name in known]
