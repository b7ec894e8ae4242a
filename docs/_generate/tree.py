"""The files of the project, and what each says of itself in its first line."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("mmdlm", "data_pipelines", "train", "eval")


def project_files() -> list[Path]:
    """Return the files that git knows or would add, relative to the root, sorted."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return sorted(path for path in map(Path, listed) if (ROOT / path).is_file())


def summary(path: Path) -> str:
    """Return the first line of a module's docstring, or the first comment of a YAML file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].replace("\n", " ")
    comment = []
    for line in text.splitlines():
        if not line.startswith("# "):
            break
        comment.append(line.removeprefix("# "))
    return " ".join(comment).split(". ")[0].rstrip(".")


def modules(*roofs: str) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the path of each module below these folders."""
    for path in project_files():
        if path.suffix == ".py" and path.parts[0] in roofs:
            parts = path.with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path
