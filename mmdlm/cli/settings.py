"""The settings of a recipe or a job as a whole: finite numbers of a sane size, nothing left out."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from mmdlm.vision.pixels import MAX_EDGE

MOST = 10**9  # of a count: steps, tokens, ids
# Of what a run would otherwise begin to make, and never end with.
LIMITS = {
    **dict.fromkeys(
        ("batch_size", "gradient_accumulation_steps", "num_generations", "prompts_per_batch"), 10**6
    ),
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), 1 << 18),
    **dict.fromkeys(("num_hidden_layers", "encoder_depth", "decoder_depth", "depth"), 10**4),
    **dict.fromkeys(("num_res_blocks", "decoder_num_res_blocks"), 10**4),
    **dict.fromkeys(("head_dim", "num_key_value_heads"), 1 << 18),
    **dict.fromkeys(("num_workers", "workers", "shots"), 256),
    **dict.fromkeys(("tokens", "max_pixels"), 10**15),
    "image_size": MAX_EDGE,
}
# What there is one of at least.
LEAST = dict.fromkeys(("samples_per_shard", "batch_size", "image_size", "max_pixels"), 1)
LEAST |= dict.fromkeys(("captions", "sample_steps"), 0)
SHARES = ("max_broken",)  # from none to all
THREADS = 1024
# Below zero, training would make worse what it is to make better.
WEIGHTS = (
    *("coefficients.text", "coefficients.image", "loss.l1", "loss.l2", "loss.gradient"),
    *("loss.sft", "loss.beta"),
)
ENDLESS = ("max_grad_norm",)  # where infinity says: no limit


def checked(settings: Mapping[str, Any], *, of: inspect.Signature | None = None) -> dict[str, Any]:
    """Check that each value in the settings, however deep, can be meant; return them.

    Args:
        settings: By name.
        of: The signature of the function that they are for, whose defaults may be empty texts.

    Returns:
        The settings, unchanged.

    Raises:
        ValueError: For a value that is NaN, infinite or far too large, a weight of the loss below
            zero, a number of threads that no machine has, an empty value where a class needs one,
            and an empty text that is no default.
    """
    for name, value in settings.items():
        if of is not None:
            _check_text(name, value, of.parameters[name].default)
        _check(name, value)
    threads = settings.get("threads")
    if threads is not None and not 1 <= threads <= THREADS:
        raise ValueError(f"threads is {threads}; it must be 1 ... {THREADS}, or left out")
    return dict(settings)


def _check(name: str, value: Any, leaf: str = "") -> None:
    """Raise ValueError for a value that cannot be meant; `leaf` is the last part of its name."""
    leaf = leaf or name.rpartition(".")[2]
    if isinstance(value, bool | str) or leaf == "seed":
        return
    if isinstance(value, int | float):
        _check_number(name, value, leaf)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            _check(f"{name}.{key}", one)
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            _check(f"{name}.{number}", one, leaf)
    elif is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        for field in fields(value):
            inner = getattr(value, field.name)
            if inner is None and not _takes_none(hints.get(field.name, Any)):
                raise ValueError(f"{name}.{field.name} is null; give it a value, or leave it out")
            _check_text(f"{name}.{field.name}", inner, field.default)
            _check(f"{name}.{field.name}", inner)


def _check_number(name: str, value: int | float, leaf: str) -> None:
    """Raise ValueError for a number that cannot be meant."""
    if name in WEIGHTS and value < 0:
        raise ValueError(f"{name} is {value}; it must be 0 or more")
    if leaf in SHARES and not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; a share lies in [0, 1]")
    if isinstance(value, float):
        if not math.isfinite(value) and (math.isnan(value) or leaf not in ENDLESS):
            raise ValueError(f"{name} is {value}; it must be a finite number")
        return
    most = LIMITS.get(leaf, MOST)
    if abs(value) > most:
        raise ValueError(f"{name} is {value}; it must be at most {most:,}")
    if value < LEAST.get(leaf, value):
        raise ValueError(f"{name} is {value}; it must be {LEAST[leaf]} or more")


def _check_text(name: str, value: Any, default: Any) -> None:
    """Raise ValueError for a text that is empty, or has an empty one in it, where none is usual."""
    texts = {name: value} if isinstance(value, str) else {}
    if isinstance(value, list | tuple):
        texts = {f"{name}.{n}": one for n, one in enumerate(value) if isinstance(one, str)}
    for place, text in texts.items():
        if not text.strip() and text != default:
            raise ValueError(f"{place} is {text!r}; give it a value, or leave it out")


def _hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except (NameError, TypeError):  # of a class that hides its types from run time
        return {}


def _takes_none(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_takes_none(one) for one in get_args(hint))
    return hint in (Any, None, type(None), object)
