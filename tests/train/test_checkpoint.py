"""A checkpoint is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from train import checkpoint

FULL = Path("/dev/full")  # every write to it finds no space left


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "weights").write_text("weights")
    (folder / "inner" / "state").write_text("state")


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_complete_one_is_found(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.latest(tmp_path) is None
    for step in (9, 10, 2):
        checkpoint.save(tmp_path, step, fill, keep=5)
    (tmp_path / "step_00000011.part").mkdir()
    (tmp_path / "final").mkdir()
    (tmp_path / "log.jsonl").touch()
    assert checkpoint.latest(tmp_path) == (tmp_path / "step_00000010", 10)
    assert (tmp_path / "step_00000010" / "inner" / "state").read_text() == "state"


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, fill, keep=2)
    assert steps(tmp_path) == ["step_00000005", "step_00000006"]


def test_the_one_just_written_stays_even_where_later_ones_lie_about(tmp_path: Path) -> None:
    for step in (7, 8):
        checkpoint.save(tmp_path, step, fill, keep=2)
    checkpoint.save(tmp_path, 3, fill, keep=2)
    assert "step_00000003" in steps(tmp_path)


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 4, fill, keep=2)
    checkpoint.save(tmp_path, 4, lambda folder: (folder / "new").touch(), keep=2)
    assert steps(tmp_path / "step_00000004") == ["new"]


def test_nothing_has_its_name_before_it_is_whole(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        fill(folder)
        assert checkpoint.latest(tmp_path) is None
        assert folder.name == "step_00000001.part"

    checkpoint.save(tmp_path, 1, write, keep=1)
    assert checkpoint.latest(tmp_path) == (tmp_path / "step_00000001", 1)


def test_what_a_killed_process_left_is_not_mixed_in(tmp_path: Path) -> None:
    part = tmp_path / "step_00000001.part"
    part.mkdir()
    (part / "torn").touch()
    checkpoint.save(tmp_path, 1, fill, keep=1)
    assert steps(tmp_path) == ["step_00000001"]
    assert steps(tmp_path / "step_00000001") == ["inner", "weights"]


def no_space(folder: Path) -> None:
    fill(folder)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torch_on_a_full_disk(folder: Path) -> None:
    (folder / "optimizer.bin").symlink_to(FULL)
    torch.save({"state": torch.zeros(1000)}, folder / "optimizer.bin")


def safetensors_on_a_full_disk(folder: Path) -> None:
    """It writes beside and renames, so the place has to be short another way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        save_file({"weight": torch.zeros(1000)}, folder / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", [no_space, torch_on_a_full_disk, safetensors_on_a_full_disk])
def test_a_full_disk_leaves_the_previous_one(write: Callable[[Path], None], tmp_path: Path) -> None:
    if write is torch_on_a_full_disk and not FULL.exists():
        pytest.skip(f"no {FULL} here")
    with pytest.raises(OSError, match="no earlier checkpoint exists"):
        checkpoint.save(tmp_path, 1, write, keep=1)
    checkpoint.save(tmp_path, 2, fill, keep=1)
    with pytest.raises(OSError, match="cannot write") as error:
        checkpoint.save(tmp_path, 3, write, keep=1)
    assert str(tmp_path / "step_00000003") in str(error.value)
    assert f"{tmp_path / 'step_00000002'} is intact" in str(error.value)
    assert "free some space" in str(error.value)
    assert steps(tmp_path) == ["step_00000002"]


def test_a_mistake_in_the_code_is_not_called_a_full_disk(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 2, fill, keep=1)

    def write(folder: Path) -> None:
        fill(folder)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        checkpoint.save(tmp_path, 3, write, keep=1)
    assert checkpoint.latest(tmp_path) == (tmp_path / "step_00000002", 2)


def test_several_processes_write_one_folder(tmp_path: Path) -> None:
    """The main process makes and renames it; `wait` stands between the phases."""
    phases = []
    part, final = tmp_path / "step_00000001.part", tmp_path / "step_00000001"

    def wait() -> None:  # what the others do meanwhile
        phases.append((part.exists(), final.exists()))
        if len(phases) == 1:
            checkpoint.replace_folder(
                final, lambda folder: (folder / "other").touch(), is_main=False
            )

    checkpoint.save(tmp_path, 1, fill, keep=1, wait=wait)
    assert phases == [(True, False), (True, False)]
    assert steps(final) == ["inner", "other", "weights"]
