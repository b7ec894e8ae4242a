"""Each published recipe of configs/rl on a tiny random model of the family that it is for."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageStat

from data_pipelines.write_shards import preferences
from mmdlm.cli.recipe import run
from mmdlm.rl.rewards.images import image_reward
from mmdlm.rl.rewards.images.clip_score import load_judge
from tests.rl.rewards.test_images import fake_open_clip
from tests.train.rewarding import assert_learned
from tests.train.tiny import logged
from train.preference import main as preference
from train.rl import main

CONFIGS = Path(__file__).parents[2] / "configs" / "rl"
ON_TOP = sorted(path for base in ("d1", "unigrpo") for path in CONFIGS.glob(f"{base}_*.yaml"))
SMALL = (
    *(
        "--num_generations",
        "2",
        "--num_iterations",
        "2",
        "--threads",
        "1",
        "--model.dtype",
        "float32",
    ),
    *("--model.lora.rank", "2", "--training.max_steps", "3", "--log_completions_every", "1"),
)
ROWS = [  # the stand-in for CLIP knows a text by the color that it begins with
    {"question": "1+1?", "answer": "so #### 2", "problem": "1+1?", "prompt": "red dog"},
    {"question": "2+1?", "answer": "so #### 3", "problem": "2+1?", "prompt": "blue cat"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Questions with answers, and an image each."""
    path = tmp_path / "data.jsonl"
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    rows = [{**row, "image": "red.png"} for row in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small stand-ins for the models that judge images: CLIP, by its package, and ImageReward."""

    class Judge:
        def scores(self, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
            return torch.tensor([ImageStat.Stat(one).mean[0] / 255 for one in images])

    monkeypatch.setattr(image_reward, "load_image_reward", lambda *given: Judge())
    monkeypatch.setitem(sys.modules, "open_clip", fake_open_clip())
    load_judge.cache_clear()
    yield
    load_judge.cache_clear()  # no other test is to meet it


def test_there_are_recipes() -> None:
    assert len(ON_TOP) >= 7


@pytest.mark.slow
@pytest.mark.usefixtures("judges")
@pytest.mark.parametrize("recipe", ON_TOP, ids=lambda path: path.stem)
def test_it_learns(
    recipe: Path, models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = recipe.with_name(f"{recipe.stem.split('_')[0]}.yaml")
    family = {"d1": "llada", "unigrpo": "mmada"}[base.stem]
    arguments = ["--config", str(base), "--config", str(recipe), *SMALL]
    arguments += ["--model.start_from", str(models / family), "--out", str(tmp_path / "run")]
    made = "{count:" in recipe.read_text()
    arguments += ["--prompts.init_args." + (f"count={20}" if made else f"path={data}")]
    rewards = list(yaml.safe_load(recipe.read_text())["reward_config"]["rubric"]["rewards"])
    if "Draw" in recipe.read_text():
        arguments += ["--answering.init_args.num_inference_steps", "2"]
    else:
        # A random model is never right: beside the recipe's rewards one tells any answers apart.
        rewards.append("checksum")
        arguments += ["--reward_config.rubric.rewards.checksum", "tests.train.rewarding.Checksum"]
        for name, value in {
            "max_new_tokens": 8,
            "num_inference_steps": 2,
            "block_length": 8,
        }.items():
            arguments += [f"--answering.init_args.{name}", str(value)]
    monkeypatch.setattr(sys, "argv", ["rl", *arguments])
    run(main)
    entries = logged(tmp_path / "run")
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert all(entry["completions/mean_length"] >= 1 for entry in entries)
    assert_learned(entries, rewards)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_vrpo_runs(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights, on pairs as TRL's data sets have them."""
    rows = [{"prompt": one["question"], "chosen": "2", "rejected": "no"} for one in ROWS]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    preferences(str(tmp_path / "pairs.json"), tmp_path / "data" / "preferences")
    arguments = [
        "--config",
        str(CONFIGS / "vrpo.yaml"),
        "--model.start_from",
        str(models / "llada"),
    ]
    arguments += ["--out", "run", "--model.attention", "sdpa", "--data.num_workers", "0"]
    arguments += ["--data.length", "128", "--training.gradient_accumulation_steps", "1"]
    arguments += ["--training.max_steps", "2", "--threads", "1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["preference", *arguments])
    run(preference)
    entries = logged(tmp_path / "run")
    assert [entry["step"] for entry in entries] == [1, 2]
    assert entries[0]["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(entry["grad_norm"] > 0 for entry in entries)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_vrpo_runs_on_images_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smoke run, on the bundled model."""
    arguments = ["--config", str(CONFIGS / "smoke_vrpo.yaml"), "--out", str(tmp_path / "run")]
    monkeypatch.chdir(CONFIGS.parents[1])
    monkeypatch.setattr(sys, "argv", ["preference", *arguments, "--threads", "1"])
    run(preference)
    entries = logged(tmp_path / "run")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert all(entry["grad_norm"] > 0 for entry in entries)
    assert (tmp_path / "run" / "adapter").is_dir()
