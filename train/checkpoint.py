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


def save(folder: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Let `write` fill a folder beside, rename it to step_N when all is on disk, drop old ones.

    A kill at any moment leaves either the whole new checkpoint or the previous ones untouched.
    Raises OSError that says so where the disk is full or not writable.
    """
    final = folder / f"step_{step:08d}"
    part = folder / f"{final.name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        for path in part.rglob("*"):
            if path.is_file():
                _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        _flush(folder)
    except Exception as error:
        if not _is_write_failure(error):
            raise
        shutil.rmtree(part, ignore_errors=True)
        survivor = latest(folder)
        kept = f"{survivor[0]} is intact" if survivor else "no earlier one exists"
        raise OSError(
            f"cannot save checkpoint {final}: {error}; {kept}. Free some space and start again: "
            "the run continues from there"
        ) from error
    for step_of, path in sorted(_complete(folder))[:-keep]:
        if step_of != step:
            shutil.rmtree(path, ignore_errors=True)
    return final


def _complete(folder: Path) -> list[tuple[int, Path]]:
    matches = ((COMPLETE.fullmatch(path.name), path) for path in folder.iterdir())
    return [(int(match[1]), path) for match, path in matches if match]


def _is_write_failure(error: Exception) -> bool:
    # torch and safetensors wrap the operating system's error in their own types.
    text = f"{type(error).__name__} {error}"
    return isinstance(error, OSError) or any(
        sign in text
        for sign in ("No space left", "PytorchStreamWriter", "SafetensorError", "I/O error")
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
