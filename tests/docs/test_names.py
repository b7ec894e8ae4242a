"""Dotted names that docstrings, comments, recipes and pages mention exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("mmdlm", "data_pipelines", "train", "eval")
TEXTS = (".py", ".md", ".yaml", ".ipynb")
NAME = re.compile(rf"(?<![\w./-])(?:{'|'.join(CODE)})(?:\.[A-Za-z_]\w*)+")
HISTORY = "CHANGELOG.md"  # names that were
FILES = {"train.jsonl"}


@cache
def module_of(dotted: str) -> Path | None:
    """Return the file of a module, or None."""
    base = ROOT.joinpath(*dotted.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


@cache
def names_in(path: Path) -> set[str]:
    """Return the names that a module defines, imports or assigns anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.Name(id=name):
                found.add(name)
            case ast.alias(name=name, asname=asname):
                found.add((asname or name).split(".")[-1])
            case ast.Attribute(attr=name):
                found.add(name)
    return found


def exists(dotted: str) -> bool:
    """Return whether a name is a module, or begins with one that has the next part of it."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = module_of(".".join(parts[:length]))
        if path is not None:
            rest = parts[length:]
            return not rest or rest[0] in names_in(path) or rest[0].startswith("__")
    return False


@pytest.mark.slow
def test_dotted_names_exist(project_files: list[Path]) -> None:
    seen, wrong = set(), []
    for path in project_files:
        wanted = path.parts[0] in (*CODE, "configs", "docs") or len(path.parts) == 1
        if not wanted or path.suffix not in TEXTS or path.name == HISTORY:
            continue
        for name in set(NAME.findall((ROOT / path).read_text(encoding="utf-8"))) - FILES:
            seen.add(name)
            if not exists(name):
                wrong.append(f"{path}: {name}")
    assert len(seen) > 300
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mmdlm.load", True),
        ("train.sft", True),
        ("mmdlm.core.diffusion.schedule.Cosine.slope", True),
        ("mmdlm.core.diffusion.schedule.Cosinus", False),
        ("mmdlm.layouts", False),
        ("eval.tasks.gsm9k", False),
    ],
)
def test_a_stale_name_is_seen(name: str, expected: bool) -> None:
    assert exists(name) is expected
