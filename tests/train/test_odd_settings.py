"""Odd settings of every recipe end in one sentence that names them, before anything is written."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from data_pipelines import room
from mmdlm.cli.recipe import run
from tests.train.test_image_tokenizer import images  # noqa: F401
from tests.train.test_preference import config as preference_recipe  # noqa: F401
from tests.train.test_pretrain import recipe as pretrain_recipe  # noqa: F401
from tests.train.test_rl import config as rl_recipe  # noqa: F401
from tests.train.test_sft import recipe as sft_recipe  # noqa: F401
from tests.train.test_sft import start  # noqa: F401

# An option, its value, and what the sentence has of it.
EVERYWHERE = [
    ("training.max_steps", "null", "max_steps"),
    ("training.max_steps", "-1", "-1"),
    ("training.max_steps", "1e30", "1e+30"),
    ("training.max_steps", ".nan", "max_steps"),
    ("training.max_steps", "many", "many"),
    ("training.max_stesp", "3", "did you mean --training.max_steps?"),
    ("training.Max_Steps", "3", "did you mean --training.max_steps?"),
    ("Out", "x", "did you mean --out?"),
    ("out", "", "a path is empty"),
    ("training.gradient_accumulation_steps", "0", "gradient_accumulation_steps"),
    ("training.sample_steps", "-1", "sample_steps is -1"),
    ("training.schedule.init_args.warmup", "-1", "warmup is -1"),
    ("training.schedule.init_args.final", "-1", "final is -1"),
    (
        "training.optimizer",
        "{class_path: train.optimizer.AdamW, init_args: {weight_decay: -1}}",
        "weight_decay is -1",
    ),
    ("training.max_grad_norm", ".nan", "nan"),
    ("training.ema", ".inf", "inf"),
    ("training.ema", "2", "2"),
    ("threads", "-1", "-1"),
    ("threads", "1000000", "1000000"),
    ("threads", "1.5", "1.5"),
]
OWN = {
    "image_tokenizer": [
        ("model.start_from", "nowhere", "nowhere"),
        ("images.urls", "nowhere", "nowhere"),
        ("model.start_from", "", "a path is empty"),
        ("images.urls", "", "images.urls is ''"),
        ("images.urls", "['']", "images.urls.0 is ''"),
        ("images.batch_size", "1000000000", "at most 1,000,000"),
        (
            "images.batch_size",
            "1000000",
            "1000000 images of 64 x 64 pixels needs at least 98.3 GB",
        ),
        ("images.num_workers", "1000000000", "images.num_workers"),
        ("images.Urls", "x", "did you mean --images.urls?"),
        ("model.options", "{width: 1000000, heads: 8}", "of memory"),
        (
            "model.options",
            "{encoder_depth: 1000000000}",
            "model.options.encoder_depth is 1000000000",
        ),
        ("model.options", "{image_size: 1000000000}", "model.options.image_size is 1000000000"),
        ("model.options", "{levels: [1000, 1000, 1000]}", "of memory"),
        ("model.options", "{Width: 8}", "did you mean width?"),
        ("images.max_broken", "-1", "images.max_broken is -1"),
        ("loss.l1", "-1", "-1"),
        ("loss.gradient", ".inf", "inf"),
    ],
    "pretrain": [
        ("coefficients.text", "-1", "-1"),
        ("coefficients.image", ".nan", "nan"),
        ("model.start_from", "nowhere", "both are given"),
        ("data.batch_size", "0", "0"),
        ("start_from", "x", "did you mean --model.start_from?"),
        ("model.lora", "{rank: 2}", "model.lora has no part in train.pretrain"),
        ("data.batch_size", "1000000000", "at most 1,000,000"),
        ("data.batch_size", "1000000", "a batch of 1000000 rows of 90 tokens needs at least"),
        ("data.length", "1000000000", "rows of 1000000000 tokens needs at least"),
        ("data.num_workers", "1000000000", "data.num_workers is 1000000000"),
        ("data.batch", "3", "did you mean --data.batch_size?"),
        ("model.text_tokenizer", "", "a path is empty"),
        ("model.vision_tower_weights", "", "a path is empty"),
        ("model.shape.hidden_size", "262144", "model (hidden_size 262144, intermediate_size 24"),
        ("model.shape.hidden_size", "1000000", "model.shape.hidden_size is 1000000"),
        ("model.shape.head_dim", "1000000000", "model.shape.head_dim is 1000000000"),
        ("model.shape.num_hidden_layers", "1000000", "model.shape.num_hidden_layers is 1000000"),
        ("model.shape.text_slots", "1000000000", "model has text_slots 1000000000"),
        ("model.shape.initializer_range", "-1", "initializer_range must be a number from 0"),
        ("training.optimizer", "train.optimizer.adamw", "did you mean train.optimizer.AdamW?"),
    ],
    "sft": [
        ("coefficients.text", "-1", "-1"),
        ("model.start_from", "nowhere", "nowhere"),
        ("data.length", "-5", "-5"),
        ("model.start_from", "", "model.start_from is ''"),
        ("data.batch_size", "1000000", "of memory"),
        ("model.lora.rank", "100000000", "lora of rank 100000000 on 4 layers needs at least"),
        ("model.lora.targets", "['']", "model.lora.targets.0 is ''"),
        ("model.lora.Rank", "3", "did you mean rank?"),
        ("model.quantization", "", "model.quantization is ''"),
    ],
    "rl": [
        ("model.start_from", "nowhere", "nowhere"),
        ("model.start_from", "", "model.start_from is ''"),
        ("num_generations", "0", "num_generations"),
        ("num_generations", "1000000000", "num_generations is 1000000000"),
        ("num_generations", "1000000", "a batch of 2000000 rows of 6 tokens needs at least"),
        ("answering.init_args.max_new_tokens", "1000000000", "max_new_tokens is 1000000000"),
        ("prompts.init_args.path", "", "path"),
        ("Num_generations", "3", "did you mean --num_generations?"),
        ("loss.init_args.beta", "-1", "-1"),
    ],
    "preference": [
        ("model.start_from", "nowhere", "nowhere"),
        ("data.batch_size", "-1", "-1"),
        ("data.batch_size", "1000000", "of memory"),
        ("model.start_from", "", "model.start_from is ''"),
        ("loss.sft", "-1", "-1"),
    ],
}
CASES = [(recipe, *case) for recipe, own in OWN.items() for case in (*EVERYWHERE, *own)]


def settings_of(recipe: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    if recipe == "image_tokenizer":
        return {"images": {"urls": request.getfixturevalue("images").urls}, "threads": 1}
    given = request.getfixturevalue(f"{recipe}_recipe")
    return json.loads(given.read_text()) if isinstance(given, Path) else given


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("recipe", "option", "value", "named"), CASES)
def test_one_sentence_names_it(
    recipe: str,
    option: str,
    value: str,
    named: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(room, "room", lambda device=None: 4 * 10**8)  # a machine of 400 MB
    out, path = tmp_path / "odd", tmp_path / "odd.json"
    path.write_text(json.dumps({**settings_of(recipe, request), "out": str(out)}))
    capsys.readouterr()
    given = [recipe, "--config", str(path), f"--{option}={value}"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as status:
        run(import_module(f"train.{recipe}").main)
    assert status.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    said = [line for line in said if line and not line.startswith("Loading weights: ")]  # a bar
    assert len(said) == 1, said
    assert named in said[0]
    assert not out.exists()
