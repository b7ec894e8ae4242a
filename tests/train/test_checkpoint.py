"""A checkpoint is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from train.checkpoints import checkpoint
from train.checkpoints.checkpoint import Checkpoints, Write

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
        Checkpoints(tmp_path, keep=5).save(step, fill)
    (tmp_path / "step_00000011.part").mkdir()
    (tmp_path / "final").mkdir()
    (tmp_path / "log.jsonl").touch()
    assert checkpoint.latest(tmp_path) == (tmp_path / "step_00000010", 10)
    assert (tmp_path / "step_00000010" / "inner" / "state").read_text() == "state"


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        Checkpoints(tmp_path, keep=2).save(step, fill)
    assert steps(tmp_path) == ["step_00000005", "step_00000006"]


def test_the_one_just_written_stays_even_where_later_ones_lie_about(tmp_path: Path) -> None:
    for step in (7, 8):
        Checkpoints(tmp_path, keep=2).save(step, fill)
    Checkpoints(tmp_path, keep=2).save(3, fill)
    assert "step_00000003" in steps(tmp_path)


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    Checkpoints(tmp_path, keep=2).save(4, fill)
    Checkpoints(tmp_path, keep=2).save(4, lambda folder: (folder / "new").touch())
    assert steps(tmp_path / "step_00000004") == ["new"]


def test_nothing_has_its_name_before_it_is_whole(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        fill(folder)
        assert checkpoint.latest(tmp_path) is None
        assert folder.name == "step_00000001.part"

    Checkpoints(tmp_path, keep=1).save(1, write)
    assert checkpoint.latest(tmp_path) == (tmp_path / "step_00000001", 1)


def test_what_a_killed_process_left_is_not_mixed_in(tmp_path: Path) -> None:
    part = tmp_path / "step_00000001.part"
    part.mkdir()
    (part / "torn").touch()
    Checkpoints(tmp_path, keep=1).save(1, fill)
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
        Checkpoints(tmp_path, keep=1).save(1, write)
    Checkpoints(tmp_path, keep=1).save(2, fill)
    with pytest.raises(OSError, match="cannot write") as error:
        Checkpoints(tmp_path, keep=1).save(3, write)
    assert str(tmp_path / "step_00000003") in str(error.value)
    assert f"{tmp_path / 'step_00000002'} is intact" in str(error.value)
    assert "free some space" in str(error.value)
    assert steps(tmp_path) == ["step_00000002"]


def test_a_mistake_in_the_code_is_not_called_a_full_disk(tmp_path: Path) -> None:
    Checkpoints(tmp_path, keep=1).save(2, fill)

    def write(folder: Path) -> None:
        fill(folder)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        Checkpoints(tmp_path, keep=1).save(3, write)
    assert checkpoint.latest(tmp_path) == (tmp_path / "step_00000002", 2)


def test_several_processes_write_one_folder(tmp_path: Path) -> None:
    """The main process makes and renames it; `wait` stands between the phases."""
    phases = []
    part, final = tmp_path / "step_00000001.part", tmp_path / "step_00000001"
    other = Checkpoints(tmp_path, keep=1, is_main=False)

    def wait() -> None:  # what the others do meanwhile
        phases.append((part.exists(), final.exists()))
        if len(phases) == 1:
            other.save(1, lambda folder: (folder / "other").touch())

    Checkpoints(tmp_path, keep=1, wait=wait).save(1, fill)
    assert phases == [(True, False), (True, False)]
    assert steps(final) == ["inner", "other", "weights"]


def slowly(disk: threading.Event, *, failing: bool = False) -> Write:
    """What goes on writing until the disk is ready."""

    def write(folder: Path) -> Callable[[], None]:
        (folder / "begun").touch()

        def rest() -> None:
            assert disk.wait(30)
            if failing:
                no_space(folder)
            fill(folder)

        return rest

    return write


def test_a_run_goes_on_while_the_disk_is_busy(tmp_path: Path) -> None:
    disk, checkpoints = threading.Event(), Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, fill)
    checkpoints.save(2, slowly(disk))
    assert checkpoint.latest(tmp_path) == (tmp_path / "step_00000001", 1)
    disk.set()
    checkpoints.finish()
    assert steps(tmp_path) == ["step_00000002"]
    assert steps(tmp_path / "step_00000002") == ["begun", "inner", "weights"]
    disk.clear()
    checkpoints.save(3, slowly(disk))
    threading.Timer(0.1, disk.set).start()
    checkpoints.save(4, fill)  # which waits for the one before
    assert steps(tmp_path) == ["step_00000004"]


def test_a_disk_that_is_full_meanwhile_is_heard_of_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk, checkpoints = threading.Event(), Checkpoints(tmp_path, keep=1)
    disk.set()
    checkpoints.save(1, fill)
    checkpoints.save(2, slowly(disk, failing=True))
    with pytest.raises(OSError, match="step_00000001 is intact"):
        checkpoints.finish()
    assert steps(tmp_path) == ["step_00000001"]
    checkpoints.finish()
    checkpoints.save(3, slowly(disk, failing=True))
    checkpoints.save(4, fill)  # which is better than to stop without
    assert "step_00000001 is intact" in caplog.text
    assert steps(tmp_path) == ["step_00000004"]


def test_a_mistake_in_another_thread_is_heard_of_as_such(tmp_path: Path) -> None:
    def write(folder: Path) -> Callable[[], None]:
        def rest() -> None:
            raise RuntimeError("a bug")

        return rest

    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, write)
    with pytest.raises(RuntimeError, match="a bug"):
        checkpoints.save(2, fill)
    assert checkpoint.latest(tmp_path) is None


def test_what_was_there_has_its_name_until_the_new_one_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "final"
    checkpoint.replace_folder(final, fill)
    rename, seen = os.replace, []

    def watched(source: Path, target: Path) -> None:
        seen.append((steps(tmp_path), target.name))
        rename(source, target)

    monkeypatch.setattr(os, "replace", watched)
    checkpoint.replace_folder(final, lambda folder: (folder / "new").touch())
    assert seen == [
        (["final", "final.part"], "final.old"),
        (["final.old", "final.part"], "final"),
    ]
    assert steps(tmp_path) == ["final"]
    assert steps(final) == ["new"]
