"""The digest of each file of a checkpoint, so that damage is found and named before it is read."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train.checkpoint import completed

FILE = "manifest.json"
THREADS = 4  # files that are digested at once


def seal(folder: Path) -> None:
    """Write the size and the digest of each file of a checkpoint into its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if path != folder / FILE]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(_digest, files))
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    (folder / FILE).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def check_newest(out: Path) -> None:
    """Raise ValueError where the newest checkpoint of a run is not as it was written.

    The message names the file, and the newest checkpoint that can be continued from instead.
    """
    found = sorted(completed(out), reverse=True) if out.is_dir() else []
    if not found:
        return
    _, newest = found[0]
    damage = damage_of(newest)
    if damage is None:
        return
    intact = next((path for _, path in found[1:] if damage_of(path) is None), None)
    then = (
        f"the same command continues from {intact}, which is intact"
        if intact
        else "the same command starts anew: no earlier checkpoint is intact"
    )
    raise ValueError(f"{newest} is damaged ({damage}); move it away, and {then}")


def damage_of(folder: Path) -> str | None:
    """What of a checkpoint is not as it was written; None: nothing."""
    if not folder.is_dir():
        return "it is no folder"
    if not (folder / FILE).is_file():
        return f"{FILE} is missing, or another version wrote the checkpoint"
    try:
        entries = json.loads((folder / FILE).read_text(encoding="utf-8"))
        sizes = {str(name): int(entry["bytes"]) for name, entry in entries.items()}
        digests = {str(name): str(entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{FILE} cannot be read: {type(error).__name__}"
    for name, size in sizes.items():
        path = folder / name
        if ".." in Path(name).parts or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(lambda name: _digest(folder / name), sizes))
    except OSError as error:
        return str(error)
    changed = [name for name, digest in zip(sizes, found, strict=True) if digest != digests[name]]
    return f"{changed[0]} has another content than was written" if changed else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
