"""The settings of a recipe as a whole: finite numbers of a sane size, nothing left out."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

MOST = 10**9  # of a count: steps, tokens, ids
# Of what a run would otherwise begin to make, and never end with.
LIMITS = {
    **dict.fromkeys(
        ("batch_size", "gradient_accumulation_steps", "group", "prompts_per_batch"), 10**6
    ),
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), 1 << 18),
    "num_hidden_layers": 10**4,
}
THREADS = 1024
# Below zero, training would make worse what it is to make better.
WEIGHTS = (
    *("coefficients.text", "coefficients.image", "loss.l1", "loss.l2", "loss.gradient"),
    *("loss.sft", "loss.beta"),
)
ENDLESS = ("max_grad_norm", "max_grad_norm")  # where infinity says: no limit


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, where each number in them, however deep, can be meant.

    Raises ValueError that names one which is NaN, infinite or far too large, a weight of the loss
    below zero, a number of threads that no machine has, and an empty value where a class needs one.
    """
    for name, value in settings.items():
        _check(name, value)
    threads = settings.get("threads")
    if threads is not None and not 1 <= threads <= THREADS:
        raise ValueError(f"threads is {threads}; it must be 1 ... {THREADS}, or left out")
    return dict(settings)


def _check(name: str, value: Any) -> None:
    leaf = name.rpartition(".")[2]
    if isinstance(value, bool | str) or leaf == "seed":
        return
    if name in WEIGHTS and isinstance(value, int | float) and value < 0:
        raise ValueError(f"{name} is {value}; it must be 0 or more")
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value) or leaf not in ENDLESS:
            raise ValueError(f"{name} is {value}; it must be a finite number")
    elif isinstance(value, int):
        most = LIMITS.get(leaf, MOST)
        if abs(value) > most:
            raise ValueError(f"{name} is {value}; it must be at most {most:,}")
    elif isinstance(value, Mapping):
        for key, one in value.items():
            _check(f"{name}.{key}", one)
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            _check(f"{name}.{number}", one)
    elif is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        for field in fields(value):
            inner = getattr(value, field.name)
            if inner is None and not _takes_none(hints.get(field.name, Any)):
                raise ValueError(f"{name}.{field.name} is null; give it a value, or leave it out")
            _check(f"{name}.{field.name}", inner)


def _hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except (NameError, TypeError):  # of a class that hides its types from run time
        return {}


def _takes_none(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_takes_none(one) for one in get_args(hint))
    return hint in (Any, None, type(None), object)
