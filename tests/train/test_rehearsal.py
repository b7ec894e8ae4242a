"""What would fail late fails before the first step; what does not fail leaves no trace in a run."""

from __future__ import annotations

import errno
import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmdlm.cli.recipe import run
from mmdlm.pipeline.model import Model
from tests.train.test_image_tokenizer import images  # noqa: F401
from tests.train.test_odd_settings import settings_of
from tests.train.test_preference import config as preference_recipe  # noqa: F401
from tests.train.test_pretrain import recipe as pretrain_recipe  # noqa: F401
from tests.train.test_processes import two
from tests.train.test_rl import config as rl_recipe  # noqa: F401
from tests.train.test_sft import recipe as sft_recipe  # noqa: F401
from tests.train.test_sft import start  # noqa: F401
from tests.train.tiny import Regression, Rows, logged, settings, trajectory
from train import loop
from train.checkpoints import rehearsal
from train.checkpoints.checkpoint import latest
from train.checkpoints.rehearsal import FOLDER
from train.checkpoints.run_state import RunState
from train.log import LOG
from train.loop import fit
from train.optimizer import NO_RATES, AdamW, Optimizer, Rates
from train.stages.samples import SampleSheet

RECIPES = ("pretrain", "sft", "rl", "preference", "image_tokenizer")


class Restless(Regression):
    """Its noise comes from all the generators that belong to nobody."""

    def forward(self, batch: Tensor, noise: Tensor) -> dict[str, Tensor]:
        noise = torch.randn(len(batch)) + random.random() + float(np.random.random())  # noqa: NPY002
        return super().forward(batch, noise)


@dataclass(frozen=True)
class Eager(Optimizer):
    """Its state is there before the first step."""

    def build(self, module: nn.Module, *, rates: Rates = NO_RATES) -> list[torch.optim.Optimizer]:
        groups = [{"params": list(module.parameters()), "peak": 0.1}]
        return [torch.optim.Adagrad(groups, lr=0.1, initial_accumulator_value=0.5)]


def greedy(step: int) -> None:
    """A look that draws from all generators."""
    torch.rand(7), random.random(), np.random.random(3)  # noqa: NPY002


def train(out: Path, stage: Regression | None = None, **options: Any) -> Rows:
    loader = options.pop("loader", None) or Rows(4)
    named = {k: options.pop(k) for k in ("on_sample", "setup", "told") if k in options}
    fit(stage or Regression(), loader, settings=settings(**options), out=out, **named)
    return loader


# ---- no trace ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", [AdamW(learning_rate=0.05), Eager()], ids=["no state", "a state"]
)
def test_a_run_is_the_same_with_it_and_without(
    optimizer: Optimizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once(name: str) -> list[str]:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        options = {"optimizer": optimizer, "ema": 0.9, "sample_steps": 100, "max_steps": 6}
        train(tmp_path / name, Restless(), on_sample=greedy, **options)
        return trajectory(tmp_path / name)

    with_it = once("with")
    monkeypatch.setattr(loop, "rehearse", lambda *given, **named: None)
    assert once("without") == with_it
    files = [{p.name for p in (tmp_path / name).iterdir()} for name in ("with", "without")]
    assert files[0] == files[1]
    last = [tmp_path / name / "step_00000006" for name in ("with", "without")]
    states = [torch.load(folder / "optimizer.bin") for folder in last]
    assert str(states[0]) == str(states[1])


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize("sharded", [False, True])
def test_so_is_one_of_two_processes(sharded: bool, tmp_path: Path) -> None:
    """With sharded weights, too, whose optimizer is given a state by being saved."""
    options: dict[str, Any] = {"optimizer": AdamW(learning_rate=0.05), "ema": 0.9, "max_steps": 4}
    two(tmp_path / "with", options, sharded=sharded)
    two(tmp_path / "without", options, sharded=sharded, unrehearsed=True)
    assert trajectory(tmp_path / "with") == trajectory(tmp_path / "without")
    assert not (tmp_path / "with" / FOLDER).exists()


def test_no_step_is_left_that_a_run_would_go_on_from(tmp_path: Path) -> None:
    class Dying(Rows):
        def __iter__(self) -> Iterator[Tensor]:
            assert latest(tmp_path) is None
            assert [path.name for path in tmp_path.iterdir()] == [LOG]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, loader=Dying(4))
    assert latest(tmp_path) is None
    (tmp_path / FOLDER / "step_00000000.part").mkdir(parents=True)  # of one that was killed
    train(tmp_path, max_steps=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOG, "step_00000001"]


def test_a_run_that_goes_on_has_tried_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    options: dict[str, Any] = {"on_sample": looks.append, "sample_steps": 2, "save_steps": 2}
    train(tmp_path, max_steps=4, **options)
    assert looks == [0, 2, 4]
    monkeypatch.setattr(loop, "rehearse", None)
    train(tmp_path, max_steps=6, **options)
    assert looks == [0, 2, 4, 6]


def test_without_sheets_none_is_tried(tmp_path: Path) -> None:
    looks: list[int] = []
    train(tmp_path, max_steps=2, on_sample=looks.append)
    assert looks == []


# ---- what fails ----------------------------------------------------------------------------------


def fails(out: Path, **options: Any) -> str:
    """What is said before any batch was read; nothing is left."""
    loader = options.pop("loader", None) or Rows(4)
    with pytest.raises((ValueError, OSError)) as error:
        train(out, loader=loader, **options)
    assert loader.given == 0
    assert not out.exists() or not list(out.iterdir())
    return str(error.value)


def test_a_sheet_that_cannot_be_drawn(tmp_path: Path) -> None:
    def look(step: int) -> None:
        raise ValueError(f"the prompt is too long at step {step}")

    said = fails(tmp_path / "run", on_sample=look, sample_steps=1000)
    assert said == (
        "the sample sheet cannot be drawn, as tried before the first step: the prompt is too long "
        "at step 0"
    )


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    said = fails(tmp_path / "run")
    assert "No space left on device; free some space" in said


def test_a_state_that_cannot_be_read_again(tmp_path: Path) -> None:
    """Of a loader of one's own: without running code torch reads plain numbers and texts."""

    class Native(Rows):
        def state_dict(self) -> dict[str, Any]:
            return {"given": self.given, "path": Path("data")}

    said = fails(tmp_path / "run", loader=Native(4))
    assert "a checkpoint cannot be continued from, as tried before the first step" in said
    assert "does not fit this run" in said


def test_a_checkpoint_that_is_no_model(tmp_path: Path) -> None:
    def setup(folder: Path) -> None:
        content = {"model_type": "mmdlm", "vocabulary": {"size": "many"}}
        (folder / "config.json").write_text(json.dumps(content))

    said = fails(tmp_path / "run", setup=setup)
    assert "a checkpoint cannot be loaded as a model, as tried before the first step" in said


# ---- of every recipe -----------------------------------------------------------------------------


def ran(recipe: str, out: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a recipe."""
    path = out.with_suffix(".json")
    path.write_text(json.dumps({**config, "out": str(out)}))
    monkeypatch.setattr(sys, "argv", [recipe, "--config", str(path)])
    try:
        run(import_module(f"train.{recipe}").main)
    except SystemExit as error:
        return int(error.code or 0)
    return 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_tries_to_save_and_to_load(
    recipe: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = settings_of(recipe, request)
    read: list[str] = []

    def refuse(self: RunState, folder: Path, *, step: int | None = None) -> None:
        assert (folder / "manifest.json").is_file()
        read.append(folder.name)
        raise ValueError("the file is empty")

    monkeypatch.setattr(RunState, "read", refuse)
    assert ran(recipe, tmp_path / "run", config, monkeypatch) == 2
    assert read == ["step_00000000"]
    said = capsys.readouterr().err
    assert "as tried before the first step: the file is empty" in said
    assert not (tmp_path / "run" / LOG).exists()


@pytest.mark.parametrize("recipe", RECIPES[:4])
def test_what_every_recipe_saves_is_loaded_as_a_model(
    recipe: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = settings_of(recipe, request)
    asked: list[Any] = []

    def load(folder: Path, **options: Any) -> Model:
        model = Model.from_pretrained(folder, **options)
        asked.append(model)
        raise ValueError("it is enough")

    monkeypatch.setattr(rehearsal, "load", load)
    assert ran(recipe, tmp_path / "run", config, monkeypatch) == 2
    assert isinstance(asked[0], Model)
    assert "answering from" not in capsys.readouterr().err


def test_an_image_tokenizer_is_loaded_as_it_will_be(
    images: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from train import image_tokenizer

    def load(folder: Path) -> None:
        assert list(folder.glob("*.safetensors"))
        raise ValueError("it is of no family")

    monkeypatch.setattr(image_tokenizer, "load_image_tokenizer", load)
    config = {"images": {"urls": images.urls}, "threads": 1}
    assert ran("image_tokenizer", tmp_path / "run", config, monkeypatch) == 2
    said = capsys.readouterr().err
    assert "what will be saved cannot be loaded, as tried before the first step" in said
    assert not (tmp_path / "run").exists()


def test_a_sheet_of_pretraining_is_drawn_first(
    pretrain_recipe: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It stays, without a warning of samples that are all alike, as they are of a new model."""
    config = json.loads(pretrain_recipe.read_text())
    config |= {"prompts": ["red heart", "heart"]}
    config["training"] |= {"max_steps": 1, "gradient_accumulation_steps": 1, "sample_steps": 1}
    steps: list[int] = []
    write = SampleSheet.write
    monkeypatch.setattr(
        SampleSheet,
        "write",
        lambda self, step, model: (steps.append(step), write(self, step, model)),
    )
    monkeypatch.setattr("train.stages.samples.lost_variety", lambda drawn: "all look alike")
    assert ran("pretrain", tmp_path / "run", config, monkeypatch) == 0
    assert steps == [0, 1]
    assert (tmp_path / "run" / "samples" / "step_00000000.png").is_file()
    assert "step 1: all look alike" in caplog.text
    assert "step 0" not in caplog.text
    assert len(logged(tmp_path / "run")) == 1
