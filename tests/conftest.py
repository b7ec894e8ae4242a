"""What all tests share: no network, and the list of the files that make up the project."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before transformers is imported: a test that asks fails at once
)

ROOT = Path(__file__).parents[1]
OUTPUTS = {"build", "data", "demo", "dist", "runs"}  # of commands; see .gitignore


@pytest.fixture(scope="session")
def project_files() -> list[Path]:
    """The project's files, relative to the root, sorted: what git tracks, and what it would add."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\0")
        files = {Path(name) for name in listed if name}
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive: no git, or no .git
        files = {path.relative_to(ROOT) for path in ROOT.rglob("*") if not path.is_dir()}
        files = {path for path in files if not _is_output(path)}
    return sorted(path for path in files if (ROOT / path).is_file())


def _is_output(path: Path) -> bool:
    return (
        path.parts[0] in OUTPUTS
        or path.suffix == ".pyc"
        or any(
            part == ".venv" or part.endswith(("cache__", "_cache", ".egg-info"))
            for part in path.parts
        )
    )
