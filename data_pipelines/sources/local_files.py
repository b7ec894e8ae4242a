"""Files that lie here: those of a folder, and those that data names, which stay inside of one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.sources.source import IMAGES


class MissingFile(ValueError):
    """A file that data names and that is not here: what names it may be of use without it."""


def files_below(folder: Path, endings: Sequence[str]) -> list[Path]:
    """Return all files with one of the endings below a folder, in order.

    Hidden files and folders are left out; links are followed, but into no folder twice. A link to
    what is not there is a file that cannot be read.
    Raises ValueError where there is no such folder, OSError where one may not be read.
    """
    if not folder.is_dir():
        raise ValueError(f"folder {folder}: no such folder")
    found: list[Path] = []
    seen: set[str] = set()
    starts = [str(folder)]
    for start in starts:  # links join behind, so that a folder has its own name where it can
        for place, folders, names in os.walk(start, onerror=_refuse):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
            below = (os.path.join(place, name) for name in folders)
            starts += [path for path in below if os.path.islink(path)]
            found += [
                Path(place, name)
                for name in names
                if name.lower().endswith(tuple(endings)) and not name.startswith(".")
            ]
    return sorted(path for path in found if path.is_file() or not path.exists())


def _refuse(error: OSError) -> None:
    raise error


def path_inside(folder: Path, name: Any, *, allow_outside: bool) -> Path:
    """Return the path that data names; ValueError where it leads out of the folder.

    Args:
        folder: That the name is relative to.
        name: As it stands in the data.
        allow_outside: Whether the name, or a link, may lead out of the folder.

    Returns:
        The path of a file.
    """
    if not isinstance(name, str):
        raise ValueError(f"the path of its image is no text but {type(name).__name__}")
    path = folder / name
    real, root = os.path.realpath(path), os.path.realpath(folder)
    if not allow_outside and os.path.commonpath([real, root]) != root:
        raise ValueError(
            f"its image {name!r} is outside of the folder {str(folder)!r}; name another folder of "
            "images, or set allow_outside to true for data that you trust"
        )
    return path


def file_inside(folder: Path, name: Any, *, allow_outside: bool) -> Path:
    """Return the path of a file that data names, as `path_inside`; ValueError for no file."""
    path = path_inside(folder, name, allow_outside=allow_outside)
    if not path.is_file():
        raise MissingFile(f"its image {name!r} is missing: no such file in {str(folder)!r}")
    return path


def image_field(path: Path) -> str:
    """Return the field of an image file: its ending. ValueError for one that shards lack."""
    extension = path.suffix.lower().removeprefix(".")
    if extension not in IMAGES:
        raise ValueError(f"its image {path.name!r} is none of {', '.join(IMAGES)}")
    return extension
