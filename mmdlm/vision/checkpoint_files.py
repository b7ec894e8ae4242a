"""Files of a checkpoint from elsewhere: where they lie, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LONGEST = 400  # characters of a library's reason that are handed on


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; ValueError names one that is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; copy or download the folder again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({reason_of(error)}); copy or download it again"
        ) from error


def reason_of(error: BaseException) -> str:
    """Return what an error of a library says, as part of a sentence."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."


def named_file(folder: Path, name: object, *, named_by: Path) -> Path:
    """Return the file of a folder that another file of it names.

    Raises ValueError for what is no name of a safetensors file in the folder itself.
    """
    plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:")
    if not isinstance(name, str) or not plain or not name.endswith(".safetensors"):
        raise ValueError(
            f"{named_by} names {shown(name)} for a file of weights; the name of a safetensors file "
            f"in {folder} is needed: copy or download it again"
        )
    return folder / name


def shown(value: object) -> str:
    """Return a value from a file as part of a sentence."""
    text = ascii(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def check_stays(path: Path, folder: Path) -> None:
    """Raise ValueError for a link that leads out of the folder.

    In the cache of the Hub links from `snapshots` lead to `blobs`, which hold all contents once.
    """
    real, root = path.resolve(), folder.resolve()
    roots = [root]
    for parent in root.parents:
        if parent.name == "snapshots":
            roots.append((parent.parent / "blobs").resolve())
    if not any(real.is_relative_to(one) for one in roots):
        raise ValueError(
            f"{path} is a link to {real}, which lies outside of {folder}; put the file itself there"
        )
