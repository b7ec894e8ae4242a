"""Rows of files: .jsonl (one object a line), .json (a list, or lines) and .csv (with heads)."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipelines.sources.compressed import OPENERS, damage_named, inner_suffix
from data_pipelines.sources.text_files import (
    check_halves,
    checked,
    json_value,
    open_text,
    parsed,
    read_text,
)

PLAIN = (".jsonl", ".json", ".csv")
ROW_FILES = (*PLAIN, *(f"{one}{packed}" for one in PLAIN for packed in OPENERS))
LONGEST_FIELD = 1 << 26  # characters of a field of a csv: long reasoning is longer than its usual


@dataclass(frozen=True)
class Row:
    """One row, and where it stands."""

    values: Mapping[str, Any]
    where: str

    def __getitem__(self, column: str) -> Any:
        if column not in self.values:
            had = ", ".join(map(str, self.values)) or "nothing"
            raise ValueError(f"{self.where} has no {column!r} (it has {had})")
        return self.values[column]

    def get(self, *columns: str, default: Any = None) -> Any:
        """Return the first of the columns that is present and not empty."""
        found = (self.values.get(one) for one in columns)
        return next((one for one in found if one not in (None, "")), default)


@dataclass(frozen=True)
class BrokenRow:
    """A row that cannot be read, and why."""

    where: str
    reason: str


def rows_in(path: Path, kind: str | None = None) -> Iterator[Row | BrokenRow]:
    """Yield the rows of a file, in order.

    Args:
        path: The file.
        kind: .jsonl, .json or .csv; default: the ending of its name.

    Yields:
        Each row, or what is wrong with it.

    Raises:
        ValueError: That names the file where it cannot be read as a whole.
    """
    read = {".jsonl": _lines, ".json": _entries, ".csv": _csv_rows}.get(kind or inner_suffix(path))
    if read is None:
        raise ValueError(f"{path} is not .jsonl, .json or .csv; write it as one of these")
    try:
        with damage_named(path):
            yield from read(path)
    except UnicodeError as error:
        raise ValueError(f"{path}: no text ({error}); save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path} is no csv that can be read ({error}); try .jsonl") from error


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file of which none may be broken.

    Raises ValueError that names the file, and the line where there is one, for anything else.
    """
    rows = [whole(row) for row in rows_in(path)]
    if not rows:
        raise ValueError(f"{path} holds no problems")
    return rows


def whole(row: Row | BrokenRow) -> Row:
    """Return the row; ValueError for a broken one."""
    if isinstance(row, BrokenRow):
        raise ValueError(f"{row.where}: {row.reason}")
    return row


def _lines(path: Path) -> Iterator[Row | BrokenRow]:
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _row(line, f"{path}, line {number}")


def _row(line: str, where: str) -> Row | BrokenRow:
    try:
        return _object(parsed(line), where)
    except ValueError as error:
        return BrokenRow(where, str(error))


def _object(value: Any, where: str) -> Row | BrokenRow:
    if isinstance(value, dict):
        return Row(value, where)
    return BrokenRow(where, f"no object but {type(value).__name__}")


def _entries(path: Path) -> Iterator[Row | BrokenRow]:
    if _holds_lines(path):
        yield from _lines(path)
        return
    try:
        text = read_text(path)
        found = json_value(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, list):
        raise ValueError(
            f"{path} is no list of objects but {type(found).__name__}; give a list, or .jsonl"
        )
    for number, entry in enumerate(found, 1):
        where = f"{path}, entry {number}"
        try:
            check_halves(entry, text)
        except ValueError as error:
            yield BrokenRow(where, str(error))
            continue
        yield _object(entry, where)


def _holds_lines(path: Path) -> bool:
    """Whether the first two lines are objects: JSON lines that are named .json, as C4 has them."""
    try:
        with open_text(path) as lines:
            first = list(islice((one for one in lines if one.strip()), 2))
        return len(first) == 2 and all(isinstance(json_value(one), dict) for one in first)
    except ValueError:
        return False


def _csv_rows(path: Path) -> Iterator[Row | BrokenRow]:
    csv.field_size_limit(LONGEST_FIELD)
    with open_text(path, newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            heads = [checked(head) for head in reader.fieldnames or ()]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if twice := [one for one, count in Counter(heads).items() if count > 1]:
            raise ValueError(f"{path} has the column {twice[0]!r} twice; rename one of them")
        for number, values in enumerate(reader, 1):
            yield _csv_row(values, f"{path}, row {number}")


def _csv_row(values: Mapping[str, Any], where: str) -> Row | BrokenRow:
    if None in values or None in values.values():
        return BrokenRow(where, "more or fewer fields than the first line")
    try:
        return Row({name: _field(value) for name, value in values.items()}, where)
    except ValueError as error:
        return BrokenRow(where, str(error))


def _field(value: str) -> str:
    return checked(value).replace("\r\n", "\n")
