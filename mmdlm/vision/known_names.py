"""The name that somebody meant who wrote one that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NEAR = 0.6  # likeness of two names, of 1 for the same, from which on one is suggested


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like another, letters of either case alike.

    Args:
        name: As it was written, perhaps with dots between its parts.
        known: Names that it may have been meant for.

    Returns:
        The name; None where none is near.
    """
    names = list(dict.fromkeys(known))
    by_lower: dict[str, str] = {}
    for one in names:
        by_lower.setdefault(_plain(one), one)
    found = difflib.get_close_matches(_plain(name), by_lower, n=1, cutoff=NEAR)
    return by_lower[found[0]] if found else None


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the nearest name, and nothing where none is near."""
    found = nearest(name, known)
    return "" if found is None else f"; did you mean {found}?"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
