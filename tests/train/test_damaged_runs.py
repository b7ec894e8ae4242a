"""Runs whose files are damaged, swapped or gone: named, or they go on as they would have."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.train.test_run_state import a_folder, cut, empty, longer, zeros
from tests.train.tiny import Regression, Rows, settings, trajectory
from train.checkpoints.manifest import FILE
from train.loop import LOG, fit
from train.optimizer import AdamW

SEEDS = 40
NEWEST, OLDER = "step_00000006", "step_00000003"
STEP_FILES = (
    *("model.safetensors", "averages.safetensors", "optimizer.bin", "loader_0.pt"),
    *("random_states_0.pkl", "skipped_steps.txt", "progress.json", "settings.json"),
    *("frozen.json", FILE),
)
Damage = Callable[[Path, random.Random], None]


def run(out: Path, *, dies_at: int | None = None) -> dict[str, torch.Tensor]:
    """Train a stage of which a part is frozen for eight steps; its weights."""
    stage = Regression(noisy=True)
    stage.still = nn.Parameter(torch.ones(4), requires_grad=False)

    def on_batch(number: int) -> None:
        if number == dies_at:
            raise KeyboardInterrupt

    options = {"optimizer": AdamW(learning_rate=0.05), "ema": 0.9, "max_steps": 8}
    return fit(stage, Rows(4, on_batch=on_batch), settings=settings(**options), out=out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """What eight steps leave that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(out)


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has done six steps, with checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("six")
    with pytest.raises(KeyboardInterrupt):
        run(out, dies_at=6)
    assert sorted(path.name for path in (out / NEWEST).iterdir()) == sorted(STEP_FILES)
    return out


def bit(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def bit_of_the_header(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(min(64, len(data)))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def swapped(path: Path, chance: random.Random) -> None:
    """With another file of its folder."""
    other = path.with_name(chance.choice([name for name in STEP_FILES if name != path.name]))
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def of_the_other_step(path: Path, chance: random.Random) -> None:
    name = OLDER if path.parent.name == NEWEST else NEWEST
    shutil.copy(path.parents[1] / name / path.name, path)


def of_a_wrong_type(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.choice([b"[]", b"7", b'"x"', b"null", b'{"a": []}']))


def plain(damage: Callable[[Path], None]) -> Damage:
    def done(path: Path, chance: random.Random) -> None:
        damage(path)

    done.__name__ = damage.__name__
    return done


DAMAGES: tuple[Damage, ...] = (
    *(bit, bit, bit_of_the_header, swapped, of_the_other_step, of_a_wrong_type),
    *map(plain, (cut, longer, zeros, empty, a_folder, Path.unlink)),
)


def steps_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_step_is_named_or_the_run_is_what_it_would_have_been(
    seed: int, six: Path, whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """The newest is named, with the one before, from which the same command goes on."""
    out, chance = tmp_path / "run", random.Random(seed)
    shutil.copytree(six, out)
    step = OLDER if seed % 5 == 0 else NEWEST
    file, damage = out / step / chance.choice(STEP_FILES), chance.choice(DAMAGES)
    before = steps_in(out / step)
    damage(file, chance)
    what = f"{damage.__name__} of {file.parent.name}/{file.name}"
    if step == NEWEST and steps_in(out / step) != before:
        with pytest.raises(ValueError, match=f"{NEWEST} is damaged") as error:
            run(out)
        said = str(error.value)
        assert "\n" not in said, what
        assert f"the same command continues from {out / OLDER}, which is intact" in said, what
        shutil.rmtree(out / NEWEST)  # as the sentence says
    weights = run(out)
    assert trajectory(out) == trajectory(whole[0]), what
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole[1].items()), what


def goes_on(out: Path, whole: tuple[Path, dict[str, torch.Tensor]]) -> None:
    weights = run(out)
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole[1].items())


def test_steps_that_have_changed_their_names(six: Path, tmp_path: Path) -> None:
    """Each is whole, but is no other step than it was."""
    out = tmp_path / "run"
    shutil.copytree(six, out)
    os.replace(out / NEWEST, out / "aside")
    os.replace(out / OLDER, out / NEWEST)
    os.replace(out / "aside", out / OLDER)
    with pytest.raises(ValueError, match=f"{NEWEST} holds step 3, not 6; give it back its name"):
        run(out)


@pytest.mark.parametrize("what", ["file", "empty folder", "link to nowhere"])
def test_what_is_no_step_but_has_the_name_of_one(
    what: str, six: Path, whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(six, out)
    strange = out / "step_00000007"
    if what == "file":
        strange.write_text("x")
    elif what == "empty folder":
        strange.mkdir()
    else:
        strange.symlink_to(out / "nowhere")
    with pytest.raises(ValueError, match="step_00000007 is damaged") as error:
        run(out)
    assert f"continues from {out / NEWEST}, which is intact" in str(error.value)


@pytest.mark.parametrize("name", ["step_00000007.part", "step_00000007.old", "step_", "step_x"])
def test_other_names_are_nobodys(
    name: str, six: Path, whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(six, out)
    (out / name).mkdir()
    goes_on(out, whole)


@pytest.mark.parametrize(
    "damage", [cut, empty, zeros, Path.unlink], ids=lambda one: str(one.__name__)
)
def test_a_damaged_log_is_said(
    damage: Callable[[Path], None],
    six: Path,
    whole: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run goes on: nothing is learned from it. Lines that are lost are counted."""
    out = tmp_path / "run"
    shutil.copytree(six, out)
    damage(out / LOG)
    goes_on(out, whole)
    said = capsys.readouterr().err
    assert f"warning: {out / LOG} lacks" in said
    assert "of its 6 lines of the 6 steps that were done" in said


def test_a_log_that_is_a_folder(six: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(six, out)
    a_folder(out / LOG)
    with pytest.raises(ValueError, match=r"log.jsonl is a folder; move it away") as error:
        run(out)
    assert str(out / LOG) in str(error.value)
