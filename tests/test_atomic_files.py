"""Files and folders are whole or as they were, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from mmdlm.atomic_files import atomic_folder, atomic_write, atomic_write_all


def full(file: BinaryIO) -> None:
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failure_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.bin"
    atomic_write(path, lambda file: file.write(b"before"))
    with pytest.raises(OSError, match=r"x\.bin cannot be written: No space left on device"):
        atomic_write(path, full)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_bytes() == b"before"
    assert os.listdir(path.parent) == ["x.bin"]


def test_an_error_of_the_source_is_passed_on(tmp_path: Path) -> None:
    """It is about another file than the one that is written, or about none."""
    for error in (OSError("the server is gone"), FileNotFoundError(2, "No such file", "source")):

        def fail(file: BinaryIO, error: OSError = error) -> None:
            raise error

        with pytest.raises(OSError, match="server|No such file") as caught:
            atomic_write(tmp_path / "x", fail)
        assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_of_several_files_none_is_renamed_before_all_are_written(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"before")
    with pytest.raises(OSError, match="No space left"):
        atomic_write_all({one: lambda file: file.write(b"after"), two: full})
    assert one.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["one"]


def test_a_file_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("fsync"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), rename(a, b)))
    atomic_write(tmp_path / "x", lambda file: file.write(b"x"))
    assert done == ["fsync", "replace"]
    done.clear()
    with atomic_folder(tmp_path / "folder") as part:
        (part / "a").touch()
    assert done == ["fsync", "fsync", "replace", "fsync"]  # file, folder, name, folder above


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with atomic_folder(final) as part:
        (part / "old").touch()
        assert not final.exists()
    with pytest.raises(FileNotFoundError), atomic_folder(final) as part:
        os.rename(part / "absent", part / "half")
    assert os.listdir(tmp_path) == ["final"]
    assert os.listdir(final) == ["old"]
    with atomic_folder(final) as part:
        (part / "new").touch()
    assert os.listdir(tmp_path) == ["final"]
    assert os.listdir(final) == ["new"]


def test_a_folder_that_may_not_be_replaced_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="exists already; name a folder that does not"),
        atomic_folder(tmp_path, replace=False),
    ):
        pytest.fail("it was begun")
