"""The page that lists every file of the project with the first line of its docstring."""

from __future__ import annotations

import re
from itertools import groupby

from docs._generate.tree import CODE, project_files, summary


def page() -> str:
    """Return the page as Markdown."""
    lines = ["# Files", "", "Each line is the first line of the file's docstring or comment.", ""]
    listed = [
        path
        for path in project_files()
        if path.parts[0] in (*CODE, "configs", "tests", "docs") and path.suffix in (".py", ".yaml")
    ]
    for roof, below in groupby(listed, key=lambda path: path.parts[0]):
        lines += [f"## `{roof}`", ""]
        for folder, inside in groupby(below, key=lambda path: path.parent.as_posix()):
            if folder != roof:
                lines += ["", f"### `{folder}`", ""]
            lines += ["| file | |", "|---|---|"]
            lines += [
                f"| `{path.name}` | {cell(summary(path))} |" for path in inside if summary(path)
            ]
        lines.append("")
    return "\n".join(lines)


def cell(text: str) -> str:
    """Return a text as one cell of a Markdown table."""
    return escaped(" ".join(text.split()), signs=r"*_[]|")


def escaped(text: str, *, signs: str = r"*_[]") -> str:
    """Return a text as Markdown that shows its signs as they are, but for code in backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part
        if part.startswith("`")
        else re.sub(f"([{re.escape(signs)}])", r"\\\1", part.replace("<", "&lt;"))
        for part in parts
    )
