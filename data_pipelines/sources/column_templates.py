"""Columns of rows, and templates over columns such as "{question} Think first."."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any


def columns_in(template: str) -> set[str]:
    """Return the columns that a column name or template needs."""
    if "{" not in template:
        return {template}
    fields = (field for _, field, _, _ in _TEXT.parse(template) if field)
    return {re.split(r"[.\[]", field)[0] for field in fields}


def filled(template: str, row: Mapping[str, Any]) -> str:
    """Return a column, or a filled template; KeyError, IndexError ... where the row lacks them."""
    value = _TEXT.vformat(template, (), row) if "{" in template else row[template]
    if not isinstance(value, str):
        raise TypeError(f"{template} is no text but {type(value).__name__}")
    return value


class _Text(string.Formatter):
    """Templates whose fields are texts or numbers: None or a list would be learned as its repr."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if not isinstance(value, str | int | float):
            raise TypeError(f"a field of the template is no text but {type(value).__name__}")
        return str(super().format_field(value, format_spec))


_TEXT = _Text()
