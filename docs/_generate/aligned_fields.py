"""Docstrings whose fields stand in columns, as sections that mkdocstrings shows as tables."""

from __future__ import annotations

from typing import Any

import griffe

from docs._generate.columns import with_sections


class AlignedFields(griffe.Extension):  # type: ignore[misc]
    """Rewrite the docstring of each class and function before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace the text of the docstring of an object that has one."""
        if obj.docstring is not None and (obj.is_class or obj.is_function):
            section = "Attributes" if obj.is_class else "Args"
            obj.docstring.value = with_sections(obj.docstring.value, section)
