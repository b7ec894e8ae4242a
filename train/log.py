"""The log of a run: one JSON line for each logged step."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from mmdlm.atomic_files import atomic_write

LOG = "log.jsonl"


class Log:
    """One JSON line a logged step; lines beyond the step a run continues from are dropped.

    Args:
        path: Of the file.
        first: Step that the run continues from.
        lines: Lines that the file has, as that step knows it.
        enabled: Whether this process writes.

    Raises:
        ValueError: A folder is in the place of the file.
    """

    def __init__(self, path: Path, first: int, *, lines: int, enabled: bool) -> None:
        self.path, self.enabled, self.lines = path, enabled, lines
        if not enabled:
            return
        if path.is_dir():
            raise ValueError(f"{path} is a folder; move it away, or train into another one")
        found = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = [line for line in found if _logged_step(line) in range(1, first + 1)]
        if len(kept) < lines:
            print(
                f"warning: {path} lacks {lines - len(kept)} of its {lines} lines of the {first} "
                "steps that were done; the run goes on without them",
                file=sys.stderr,
            )
        self.lines = len(kept)
        text = "".join(f"{line}\n" for line in kept)
        atomic_write(path, lambda file: file.write(text.encode()))

    def write(self, step: int, entry: dict[str, float]) -> None:
        self.lines += 1
        if self.enabled:
            known = {
                k: v if math.isfinite(v) else None for k, v in entry.items()
            }  # JSON has no NaN
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **known}) + "\n")


def _logged_step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be torn
        return -1
