"""Files and folders that are written whole or not at all, whatever ends the process meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PART = ".part"  # ending of what is not complete yet
Write = Callable[[BinaryIO], object]


def atomic_write(path: Path, write: Write, *, part: str = PART) -> None:
    """Write a file beside its place, flush it to disk, then rename it.

    After a kill or a failure at any moment the file is either new and whole, or as it was before.

    Args:
        path: Place of the file; folders above it are made.
        write: Called with the open file beside.
        part: Ending of the file beside; several processes that write one path need one each.

    Raises:
        OSError: The file cannot be written, and the message says so; an error of where the content
            comes from is passed on as it is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"folder {path.parent} cannot be made: {error.strerror}") from error
    try:
        atomic_write_all({path: write}, part=part)
    except OSError as error:
        beside = str(_beside(path, part))
        if error.errno is None or error.filename not in (None, beside):
            raise  # where the content comes from has failed, and says so itself
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


def atomic_write_all(files: Mapping[Path, Write], *, part: str = PART) -> None:
    """Write several files as `atomic_write` does; none is renamed before all are on disk.

    Args:
        files: Place of each file, whose folder exists, and what writes it.
        part: Ending of the files beside.

    Raises:
        OSError: One of them cannot be written; all are as they were before.
    """
    beside = {path: _beside(path, part) for path in files}
    try:
        for path, write in files.items():
            with open(beside[path], "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(beside[path], path)
    except BaseException:
        for one in beside.values():
            one.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(final: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give a folder beside to fill, and rename it to `final` when all of it is on disk.

    A kill at any moment leaves either the whole new folder or what was there before; that one, for
    the moment between two renames, as `final`.old. A failure leaves what was there.

    Args:
        final: Place of the folder; folders above it are made.
        replace: Whether a folder that is there gives way.

    Yields:
        The folder to fill.

    Raises:
        ValueError: `final` exists, and may not be replaced.
    """
    if not replace and final.exists():
        raise ValueError(f"{final} exists already; name a folder that does not, or remove it")
    part = begin_folder(final)
    try:
        yield part
        finish_folder(final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def begin_folder(final: Path) -> Path:
    """Return the empty folder beside `final`, for `finish_folder` to rename when it is filled."""
    part = _beside(final, PART)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def finish_folder(final: Path) -> None:
    """Flush the folder beside `final` to disk, and rename it.

    What was there gives way, and is removed when the new folder has its name.
    """
    part = _beside(final, PART)
    for path in (*part.rglob("*"), part):
        _flush(path)
    old = _beside(final, ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(part, final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _flush(path: Path) -> None:
    """Wait until a file or a folder is on disk, so that a rename never precedes it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
