"""The digest of each file of a checkpoint, so that damage is found and named before it is read."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmdlm.models.checkpoints.run_steps import MANIFEST, completed, damage_of
from mmdlm.vision.digests import THREADS, digest_of

FILE = MANIFEST


def seal(folder: Path) -> None:
    """Write the size and the digest of each file of a checkpoint into its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if path != folder / FILE]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(digest_of, files))
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
        else "the same command starts again: no earlier checkpoint is intact"
    )
    raise ValueError(f"{newest} is damaged ({damage}); move it away, and {then}")
