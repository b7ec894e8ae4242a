"""What a run continues from: every damage is named, nothing in it can run code."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.tiny import Evil, Plain, Regression, Rows, settings, trajectory
from train.checkpoints.manifest import FILE, damage_of, seal
from train.checkpoints.run_state import AVERAGES, WEIGHTS
from train.loop import fit
from train.optimizer import AdamW

OPTIONS: dict[str, Any] = {"optimizer": AdamW(learning_rate=0.05), "ema": 0.9, "max_steps": 6}


def run(out: Path, **options: Any) -> Regression:
    stage = Regression(noisy=True)
    fit(stage, Rows(4), settings=settings(**{**OPTIONS, **options}), out=out)
    return stage


@pytest.fixture
def six(tmp_path: Path) -> Path:
    """A run of six steps, with checkpoints at 3 and 6."""
    run(tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES = (WEIGHTS, AVERAGES, "optimizer.bin", "loader_0.pt", "random_states_0.pkl")
DAMAGES = (flip, cut, longer, zeros, empty, a_folder, Path.unlink)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda one: one.__name__)
def test_damage_is_named_and_the_step_before_is_offered(
    damage: Callable[[Path], None], six: Path, tmp_path: Path
) -> None:
    newest = six / "step_00000006"
    for name in FILES:
        broken = tmp_path / name
        shutil.copytree(six, broken)
        damage(broken / newest.name / name)
        with pytest.raises(ValueError, match=f"step_00000006 is damaged.*{name}") as error:
            run(broken)
        assert f"the same command continues from {broken / 'step_00000003'}" in str(error.value)
    shutil.rmtree(broken / newest.name)  # as the sentence says
    run(broken)
    assert trajectory(broken) == trajectory(six)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'{"a": 1}', b"\xff\xfe", b"[" * 100_000, b'{"../x": {"bytes": 1}}'],
    ids=lambda content: repr(content[:12]),
)
def test_a_damaged_manifest(content: bytes, six: Path) -> None:
    (six / "step_00000006" / FILE).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"step_00000006 is damaged .*manifest\.json.*step_00000003"
    ):
        run(six)


def test_when_none_is_intact_a_new_beginning_is_offered(six: Path) -> None:
    for step in (3, 6):
        flip(six / f"step_0000000{step}" / WEIGHTS)
    with pytest.raises(ValueError, match="starts again: no earlier checkpoint is intact"):
        run(six)


def test_a_file_outside_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "secret").write_text("secret")
    seal(tmp_path / "step")
    entry = {"../secret": {"bytes": 6, "sha256": ""}}
    (tmp_path / "step" / FILE).write_text(json.dumps(entry))
    assert damage_of(tmp_path / "step") == "../secret is missing"


@pytest.mark.parametrize("name", ["optimizer.bin", "loader_0.pt", "random_states_0.pkl"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_folder_that_someone_else_prepared_runs_no_code(
    name: str, form: str, six: Path, tmp_path: Path
) -> None:
    """Its digests are right, as whoever prepares a folder writes them, too."""
    newest, mark = six / "step_00000006", tmp_path / "mark"
    if form == "torch":
        torch.save({"state": Evil(mark)}, newest / name)
    else:
        (newest / name).write_bytes(pickle.dumps(Evil(mark)))
    seal(newest)
    with pytest.raises(ValueError, match="step_00000006 does not fit this run"):
        run(six)
    assert not mark.exists()


def test_files_that_nobody_wrote_are_not_read(six: Path, tmp_path: Path) -> None:
    """Such as those that accelerate would unpickle."""
    for name in ("custom_checkpoint_0.pkl", "sampler.bin", "scheduler.bin", "pytorch_model.bin"):
        torch.save(Evil(tmp_path / "mark"), six / "step_00000006" / name)
    run(six)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "missing", "more"])
@pytest.mark.parametrize("file", [WEIGHTS, AVERAGES])
def test_tensors_of_another_run_are_refused(change: str, file: str, six: Path) -> None:
    newest = six / "step_00000006"
    tensors = load_file(newest / file)
    bias = tensors.pop("linear.bias")
    if change != "missing":
        name = "linear.other" if change == "name" else "linear.bias"
        kind = torch.float16 if change == "dtype" else torch.float32
        tensors[name] = bias.expand(3).to(kind).clone() if change == "shape" else bias.to(kind)
    if change == "more":
        tensors["linear.more"] = bias.clone()
    save_file(tensors, newest / file, metadata={"format": "pt", "updates": "6"})
    seal(newest)
    with pytest.raises(ValueError, match=r"step_00000006 does not fit this run \(linear\."):
        run(six)


def test_another_kind_of_optimizer_is_refused(six: Path) -> None:
    with pytest.raises(ValueError, match="step_00000006 does not fit this run"):
        run(six, optimizer=Plain(momentum=0.9))


@pytest.mark.slow
def test_global_generators_go_on_too(tmp_path: Path) -> None:
    """What users plug in may draw from them."""

    def drawing(out: Path, *, dies_at: int | None = None) -> list[tuple[float, ...]]:
        drawn = []

        def on_batch(number: int) -> None:
            if number == dies_at:
                raise KeyboardInterrupt
            numbers = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002
            drawn.append(numbers)

        with suppress(KeyboardInterrupt):
            fit(Regression(), Rows(4, on_batch=on_batch), settings=settings(), out=out)
        return drawn

    whole = drawing(tmp_path / "whole")
    drawing(tmp_path / "killed", dies_at=5)
    again = drawing(tmp_path / "killed")
    assert len(set(whole)) == 8
    assert again != whole[3:]  # the generators were seeded by nobody, so the runs differ ...
    for run_of in ("one", "two"):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        if run_of == "one":
            whole = drawing(tmp_path / "one")
        else:
            drawing(tmp_path / "two", dies_at=5)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert drawing(tmp_path / "two") == whole[3:]  # ... but not where the user has seeded them
