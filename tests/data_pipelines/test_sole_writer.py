"""Two commands, one output: the second is told of the first, whose death leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.jobs.sole_writer import LOCK, sole_writer, writing

ROOT = Path(__file__).parents[2]
# Holds an output until it is killed; with "fork" a worker of it lives on, as those of loaders do.
HOLDER = """
import os, sys, time
from pathlib import Path
from data_pipelines.jobs.sole_writer import writing
with writing(Path(sys.argv[1]), is_file=sys.argv[2] == "file"):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    print("holds", flush=True)
    sys.stdin.read()
"""


def holder(out: Path, kind: str = "folder", **environment: str) -> subprocess.Popen[str]:
    """A process that holds an output, once it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out), kind],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.iterdir())
    }


@pytest.mark.parametrize("kind", ["folder", "file", "fork"])
def test_the_second_is_told_which_process_writes(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = holder(out, kind)
    try:
        folder = tmp_path if kind == "file" else out
        before = contents(folder)
        said = f"out is being written by process {first.pid} on .*wait for it, stop it"
        with pytest.raises(ValueError, match=said), writing(out, is_file=kind == "file"):
            pytest.fail("both write")
        assert contents(folder) == before
        first.kill()
        assert first.wait() == -signal.SIGKILL
        with writing(out, is_file=kind == "file"):  # at once, though a worker lives on
            (out if kind == "file" else out / "data").touch()
    finally:
        os.killpg(first.pid, signal.SIGKILL) if kind == "fork" else first.kill()
    assert not list(tmp_path.rglob(f"*{LOCK}"))


def test_the_one_that_ends_makes_room(tmp_path: Path) -> None:
    first = holder(tmp_path / "out")
    first.communicate("")
    assert first.returncode == 0
    with writing(tmp_path / "out"):
        pass


def test_other_outputs_are_free(tmp_path: Path) -> None:
    first = holder(tmp_path / "a")
    try:
        with writing(tmp_path / "b"), writing(tmp_path / "a" / "inner"):
            pass
    finally:
        first.kill()


def test_a_folder_of_which_nothing_came_vanishes(tmp_path: Path) -> None:
    @sole_writer
    def fails(out: Path, *, count: int = 1) -> None:
        assert out.is_dir()
        raise ValueError(f"count is {count}")

    with pytest.raises(ValueError, match="count is 3"):
        fails(out=tmp_path / "out", count=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["", "."])
def test_no_name_is_refused(out: str) -> None:
    with (
        pytest.raises(ValueError, match="out is '', the current folder; name one"),
        writing(Path(out)),
    ):
        pytest.fail("entered")


def test_all_processes_of_a_launch_write_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = {"MASTER_ADDR": "here", "MASTER_PORT": "1", "WORLD_SIZE": "2"}
    first = holder(tmp_path / "out", RANK="0", **launch)
    try:
        for name, value in launch.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("RANK", "1")
        with writing(tmp_path / "out"):
            pass
        monkeypatch.setenv("MASTER_PORT", "2")  # of another launch
        with (
            pytest.raises(ValueError, match=f"is being written by process {first.pid}"),
            writing(tmp_path / "out"),
        ):
            pytest.fail("both launches write")
    finally:
        first.kill()
    first.wait()
    with writing(tmp_path / "out"):  # what a killed one has left is not held
        pass
