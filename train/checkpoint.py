"""Checkpoints of a running job: complete or absent, never half; the newest few are kept."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

COMPLETE = re.compile(r"step_(\d+)")


def latest(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint of a run and its step; None where there is none."""
    found = _complete(folder) if folder.is_dir() else []
    if not found:
        return None
    step, path = max(found)
    return path, step


def save(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep: int,
    is_main: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> Path:
    """Write folder/step_N as `replace_folder` does, then drop all but the newest `keep`.

    Raises OSError that says so, and what remains, where the disk is full or not writable.
    """
    final = folder / f"step_{step:08d}"
    try:
        replace_folder(final, write, is_main=is_main, wait=wait)
    except OSError as error:
        survivor = latest(folder)
        kept = f"{survivor[0]} is intact" if survivor else "no earlier checkpoint exists"
        raise OSError(f"{error}; {kept}, and the same command continues the run") from error
    if is_main:
        for step_of, path in sorted(_complete(folder))[:-keep]:
            if step_of != step:
                shutil.rmtree(path, ignore_errors=True)
    return final


def replace_folder(
    final: Path,
    write: Callable[[Path], None],
    *,
    is_main: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Let `write` fill a folder beside; rename it to `final` when all of it is on disk.

    A kill at any moment leaves either the whole new folder or what was there before. Where several
    processes write one folder, each calls this, `is_main` holds for one, and `wait` returns when
    all have reached it. Raises OSError that says so where the disk is full or not writable.
    """
    part = final.with_name(f"{final.name}.part")
    try:
        if is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        wait()
        write(part)
        wait()
        if is_main:
            for path in (*part.rglob("*"), part):
                _flush(path)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            _flush(final.parent)
    except Exception as error:
        if not _is_write_failure(error):
            raise
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"cannot write {final}: {error}; free some space") from error


def _complete(folder: Path) -> list[tuple[int, Path]]:
    matches = ((COMPLETE.fullmatch(path.name), path) for path in folder.iterdir())
    return [(int(match[1]), path) for match, path in matches if match]


def _is_write_failure(error: Exception) -> bool:
    # torch and safetensors wrap the operating system's error in their own types.
    text = f"{type(error).__name__} {error}"
    return isinstance(error, OSError) or any(
        sign in text
        for sign in ("No space left", "PytorchStreamWriter", "inline_container", "SafetensorError")
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
