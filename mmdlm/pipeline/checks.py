"""Check plain values that a checkpoint, a recipe or a command line carries."""

from __future__ import annotations

import math
from typing import Any, TypeGuard, get_args

from mmdlm.vision.known_names import suggestion


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole_number(name: str, value: object, *, least: int) -> None:
    """Raise ValueError unless a value is a whole number of at least `least`."""
    if not is_whole(value) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless a value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_not_negative(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a finite number of at least 0."""
    check_number(name, value)
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value!r}")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ValueError unless a value is one of the strings of a Literal."""
    known = get_args(choices)
    if value not in known:
        near = suggestion(value, known) if isinstance(value, str) else ""
        raise ValueError(f"{name} {value!r} is not one of {', '.join(map(repr, known))}{near}")


def check_ids(name: str, value: object) -> None:
    """Raise ValueError unless a value is a tuple of token ids."""
    if not isinstance(value, tuple) or not all(is_whole(i) and i >= 0 for i in value):
        raise ValueError(f"{name} must be a list of token ids, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise ValueError unless a value is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
