"""Odd settings of every recipe end in one sentence that names them, before anything is written."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

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
    ("training.stesp", "3", "stesp"),
    ("training.gradient_accumulation_steps", "0", "gradient_accumulation_steps"),
    ("training.max_grad_norm", ".nan", "nan"),
    ("training.ema", ".inf", "inf"),
    ("training.ema", "2", "2"),
    ("threads", "-1", "-1"),
    ("threads", "1000000", "1000000"),
    ("threads", "1.5", "1.5"),
]
OWN = {
    "image_tokenizer": [
        ("start_from", "nowhere", "nowhere"),
        ("images.urls", "nowhere", "nowhere"),
        ("loss.l1", "-1", "-1"),
        ("loss.gradient", ".inf", "inf"),
    ],
    "pretrain": [
        ("coefficients.text", "-1", "-1"),
        ("coefficients.image", ".nan", "nan"),
        ("start_from", "nowhere", "nowhere"),
        ("data.batch_size", "0", "0"),
    ],
    "sft": [
        ("coefficients.text", "-1", "-1"),
        ("start_from", "nowhere", "nowhere"),
        ("data.length", "-5", "-5"),
    ],
    "rl": [
        ("start_from", "nowhere", "nowhere"),
        ("group", "0", "group"),
        ("loss.init_args.beta", "-1", "-1"),
    ],
    "preference": [
        ("start_from", "nowhere", "nowhere"),
        ("data.batch_size", "-1", "-1"),
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
