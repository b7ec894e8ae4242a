"""How a config.json stretches rotary positions: what is honoured, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmdlm.models.families.base import Json, number, refuse_unless

LENGTH = "original_max_position_embeddings"
# The types that do not depend on the longest row of a batch -> numbers that they need, and take.
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (LENGTH,)),
    "yarn": (
        ("factor",),
        (LENGTH, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
}
NAMES = ("rope_type", "type")  # newer and older configs
PLACES = ("rope_scaling", "rope_parameters")  # older and newer configs
UNSTRETCHED = ("rope_theta", "partial_rotary_factor")  # what else newer configs keep there


def rope_of(config: Json) -> Json:
    """Read `rope_theta` and `rope_scaling` from wherever a published config.json keeps them.

    Raises ValueError for what `check_rope_scaling` refuses, for positions that turn a part of a
    head, and for two places that disagree.
    """
    _refuse_partial(config)
    theta, scaling = config.get("rope_theta"), None
    for place in PLACES:
        given = config.get(place) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"config.json has {place} = {given!r}; an object {{...}} is needed")
        _refuse_partial(given)
        stretched = _stretched(given, config)
        theta = _agreed("rope_theta", theta, given.get("rope_theta"), place)
        scaling = _agreed("rope_scaling", scaling, stretched, place)
    check_rope_scaling(scaling)
    return {
        "rope_theta": number({"rope_theta": theta}, "rope_theta", default=10_000.0),
        "rope_scaling": scaling,
    }


def _refuse_partial(given: Mapping[str, Any]) -> None:
    """Raise ValueError where only a part of each head would turn."""
    if given.get("partial_rotary_factor") is not None:
        refuse_unless(dict(given), {"partial_rotary_factor": 1.0})


def _stretched(given: Mapping[str, Any], config: Json) -> Json | None:
    """Return what one key of config.json says of stretching; None for plain positions."""
    scaling = {name: value for name, value in given.items() if name not in UNSTRETCHED}
    kind = rope_type(scaling)
    if kind == "default" and set(scaling) <= set(NAMES):
        return None
    if config.get(LENGTH) and kind in ROPE_TYPES and LENGTH in ROPE_TYPES[kind][1]:
        scaling[LENGTH] = config[LENGTH]  # transformers gives it priority
    return scaling


def _agreed(name: str, known: Any, found: Any, place: str) -> Any:
    """One of two values of which one may be missing; ValueError where they differ."""
    if known is not None and found is not None and known != found:
        raise ValueError(
            f"config.json has two values of {name}, {known!r} and, in {place}, {found!r}; keep one"
        )
    return found if known is None else known


def rope_type(scaling: Mapping[str, Any]) -> str:
    """Return the name of a way to stretch positions."""
    return str(next((scaling[name] for name in NAMES if scaling.get(name)), "default"))


def check_rope_scaling(scaling: Mapping[str, Any] | None) -> None:
    """Raise ValueError for a stretching that is unknown, incomplete, or holds an odd value."""
    if scaling is None or scaling == {}:
        return
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rope_scaling must be an object {{...}} or null, not {scaling!r}")
    kind = rope_type(scaling)
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"rope_scaling of type {kind!r} is not one of {', '.join(ROPE_TYPES)}; others depend "
            "on the longest row of a batch"
        )
    needed, optional = ROPE_TYPES[kind]
    flags = ("truncate",) if kind == "yarn" else ()
    if missing := [name for name in needed if scaling.get(name) is None]:
        raise ValueError(f"rope_scaling of type {kind!r} has no {missing[0]!r}, which it needs")
    for name, value in scaling.items():
        if name in NAMES:
            fine, wanted = value in (None, kind), f"{kind!r}, as the other name of it says"
        elif name in flags:
            fine, wanted = value in (None, True, False), "true or false"
        elif name in needed or name in optional:
            fine = value is None or _is_positive(value)
            wanted = "a number above 0"
        else:
            raise ValueError(
                f"rope_scaling of type {kind!r} has {name!r}, which is not known here; it takes "
                f"{', '.join((*needed, *optional, *flags))}"
            )
        if not fine:
            raise ValueError(f"rope_scaling has {name} = {value!r}; {wanted} is needed")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(
            f"rope_scaling has low_freq_factor = {scaling['low_freq_factor']!r}, which must be "
            f"below high_freq_factor = {scaling['high_freq_factor']!r}"
        )


def _is_positive(value: object) -> bool:
    """Whether a value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value > 0
