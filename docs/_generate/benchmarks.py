"""The pages of measurements: tables and their origin, from the JSON of docs/benchmarks/data."""

from __future__ import annotations

import json
from typing import Any

from docs._generate.files_page import cell
from docs._generate.tree import ROOT

DATA = ROOT / "docs" / "benchmarks" / "data"


def pages() -> dict[str, str]:
    """Return the pages by their place in docs/: one for each file."""
    return {
        f"benchmarks/{path.stem}.md": _page(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(DATA.glob("*.json"))
    }


def _page(data: dict[str, Any]) -> str:
    lines = [f"# {data['title']}", "", data["introduction"], ""]
    for table in data["tables"]:
        lines += [f"## {table['title']}", ""]
        lines += [*_paragraphs(table.get("before", [])), *_table(table), ""]
        lines += [f"Command: `{command}`\n" for command in table["commands"]]
        lines += [
            f"Measured on {table['date']}, commit `{table['commit']}`. Hardware: "
            f"{table['hardware']}. Weights: {table['weights']}.",
            "",
            *_paragraphs(table.get("notes", [])),
        ]
        for image in table.get("images", []):
            lines += [f"![{image['alt']}](../assets/{image['file']})", ""]
    return "\n".join(lines)


def _table(table: dict[str, Any]) -> list[str]:
    columns = table["columns"]
    assert all(len(row) == len(columns) for row in table["rows"]), table["title"]
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cell(str(value)) for value in row) + " |" for row in table["rows"]),
    ]


def _paragraphs(texts: list[str]) -> list[str]:
    return [line for text in texts for line in (text, "")]
