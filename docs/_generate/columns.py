"""Fields that stand in columns in a docstring: read, and written as sections of Google's style."""

from __future__ import annotations

import re

FIELD = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*) {2,}(\S.*)$")


def fields_of(paragraph: str) -> dict[str, str] | None:
    """Return name -> meaning of a paragraph of fields in columns; None for another paragraph."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in paragraph.splitlines():
        match = FIELD.match(line)
        if match:
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        elif names and line.startswith("  "):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            return None
    return found or None


def with_sections(text: str, section: str) -> str:
    """Return a docstring in which each paragraph of fields is a section of Google's style."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        found = fields_of(paragraph)
        lines = [f"{section}:", *(f"    {name}: {told}" for name, told in (found or {}).items())]
        paragraphs.append("\n".join(lines) if found else paragraph)
    return "\n\n".join(paragraphs)
