"""Digests of files of weights beside them, so that damage is told from a model."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmdlm.vision.checkpoint_files import read_json

FILE = "digests.json"
THREADS = 4  # files that are digested at once


def digest_of(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def forget_digests(folder: Path) -> None:
    """Remove the digests of a folder whose files are about to become others."""
    (folder / FILE).unlink(missing_ok=True)


def write_digests(folder: Path) -> None:
    """Write the size and the digest of each file of weights in a folder, when all are there."""
    files = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(digest_of, files))
    entries = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    (folder / FILE).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def check_digests(folder: Path) -> None:
    """Compare the files of weights in a folder with their digests, where it has some.

    Folders of other libraries have none, and nothing of them is compared.

    Args:
        folder: Of a model.

    Raises:
        ValueError: Names a file that is not as it was written.
    """
    path = folder / FILE
    if not path.exists():
        return
    entries = _entries(read_json(path), path)
    # Those that are missing are named by whoever reads them, perhaps under another name.
    entries = {name: entry for name, entry in entries.items() if (folder / name).is_file()}
    for name, (size, _) in entries.items():
        there = (folder / name).stat().st_size
        if there != size:
            raise ValueError(_said(folder / name, f"it has {there:,} bytes of {size:,}"))
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: digest_of(folder / name), entries))
    for (name, (_, digest)), other in zip(entries.items(), found, strict=True):
        if other != digest:
            raise ValueError(_said(folder / name, "its content is another"))


def _said(path: Path, how: str) -> str:
    return (
        f"{path} is not as it was written ({how}); copy or download it again, or remove "
        f"{path.with_name(FILE)} if you changed it yourself"
    )


def _entries(content: Any, path: Path) -> dict[str, tuple[int, str]]:
    """Names of files in the folder of `path`, with their sizes and digests."""
    try:
        entries = {
            str(name): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in content.items()
        }
    except (AttributeError, TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} does not hold digests of files; copy or download it again, or remove it"
        ) from error
    for name in entries:
        if not name.endswith(".safetensors") or set(name) & set("/\\:"):
            raise ValueError(f"{path} names {name!r}, which is no file of weights beside it")
    return entries
