"""Look at recipe files before they are parsed: they are texts that somebody has written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 10**7
MOST_VALUES = 10**5  # with those that anchors repeat


def check_recipes(arguments: Sequence[str]) -> None:
    """Check the files that `--config` names among the arguments of a command line.

    Args:
        arguments: Of the command line, without the program.

    Raises:
        ValueError: Names a file that is no text, that is too large, or whose anchors (&, *) unfold
            to more values than a recipe has: a few lines can stand for billions.
    """
    for path in _named(arguments):
        if not path.is_file():
            continue  # the parser says so
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"{path} has {size:,} bytes; a recipe has at most {MOST_BYTES:,}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is no text in UTF-8 (at {error.start}); save it as UTF-8"
            ) from error
        except (yaml.YAMLError, ValueError, RecursionError):
            continue  # the parser says what is wrong with it
        if _values(content, {}) > MOST_VALUES:
            raise ValueError(
                f"{path} unfolds to more than {MOST_VALUES:,} values by its anchors (&, *); write "
                "out what is meant"
            )


def _named(arguments: Sequence[str]) -> Iterator[Path]:
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config" and equals:
            yield Path(value)
        elif name == "--config" and number + 1 < len(arguments):
            yield Path(arguments[number + 1])


def _values(content: Any, known: dict[int, float]) -> float:
    """How many values there are when each alias is written out; infinity for one within itself."""
    if not isinstance(content, dict | list):
        return 1
    if id(content) not in known:
        known[id(content)] = float("inf")
        inner = content.values() if isinstance(content, dict) else content
        known[id(content)] = 1 + sum(_values(one, known) for one in inner)
    return known[id(content)]
