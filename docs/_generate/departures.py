"""The page of departures: where docstrings and recipes say that they do other than published."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from docs._generate.files_page import escaped
from docs._generate.tree import CODE, ROOT, modules, project_files

_NAMED = re.compile(r"\bdepartures?\b", re.IGNORECASE)
_SECTION = re.compile(r"^(Source|Departures?):", re.MULTILINE)


@dataclass(frozen=True)
class Departure:
    """What one docstring or recipe says.

    Attributes:
        path: The file, relative to the root.
        name: Dotted name of the class or function; the path for a recipe.
        text: The paragraphs that name a source or a departure.
    """

    path: Path
    name: str
    text: str


def departures() -> list[Departure]:
    """Return all of them, by file."""
    found = []
    for module, path in modules(*CODE):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        found += _of(tree, module, path)
    for path in project_files():
        if path.parts[0] == "configs" and path.suffix == ".yaml":
            comment = _comment((ROOT / path).read_text(encoding="utf-8"))
            text = _relevant(comment)
            if text:
                found.append(Departure(path, path.as_posix(), text))
    return found


def page(written: str) -> str:
    """Return the page: what is written by hand, then what the code says.

    Args:
        written: The Markdown of docs/explanation/departures.md.
    """
    lines = [written.rstrip(), ""]
    every = departures()
    for roof, some in groupby(every, key=lambda one: one.path.parts[0]):
        lines += [f"### `{roof}`", ""]
        for one in some:
            lines += [f"`{one.name}`", f":   {escaped(one.text)}", ""]
    return "\n".join(lines)


def _of(tree: ast.AST, prefix: str, path: Path) -> list[Departure]:
    found = []
    if isinstance(tree, ast.Module | ast.ClassDef | ast.FunctionDef):
        text = _relevant(ast.get_docstring(tree) or "")
        if text:
            found.append(Departure(path, prefix, text))
        for child in tree.body:
            name = getattr(child, "name", None)
            if name is not None:
                found += _of(child, f"{prefix}.{name}", path)
    return found


def _relevant(docstring: str) -> str:
    """The paragraphs that name a departure, and those of the same text that name the source."""
    if not _NAMED.search(docstring):
        return ""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring)]
    kept = [one for one in paragraphs if _NAMED.search(one) or one.startswith("Source:")]
    joined = " ".join(kept)
    start = _SECTION.search(joined) or _NAMED.search(joined)
    assert start is not None
    return joined[joined.rfind("Source:") :] if "Source:" in joined else joined[start.start() :]


def _comment(text: str) -> str:
    """The comment at the head of a YAML file."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return re.sub(r"\n(?=(Source|Departures?|Not published)[:,])", "\n\n", "\n".join(lines))
