"""How a model fills its targets when the caller does not say: one record for each task."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from mmdlm.core.sampler import (
    CommitRule,
    Confidence,
    Entropy,
    EvenSplit,
    LeftToRight,
    Margin,
    Order,
    Random,
    Remasking,
    Sampler,
    ScheduledCount,
)
from mmdlm.core.schedule import Cosine
from mmdlm.vision.pixels import Fit

GENERATION = "generation.json"  # where a checkpoint carries its own defaults

OrderName = Literal["confidence", "margin", "entropy", "random", "left_to_right"]
ScheduleName = Literal["linear", "cosine"]


def _check_choice(name: str, value: object, choices: Any) -> None:
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(map(repr, known))}")


@dataclass(frozen=True)
class Decoding:
    """The sampler of one task in plain values, so that a checkpoint can carry it.

    Names stand for classes of `mmdlm.core.sampler`: downloaded weights must not choose imports.

    num_inference_steps  denoising steps
    guidance_scale       classifier-free guidance; 1 is off
    temperature          of the draw of tokens; 0 takes the most likely one
    top_k, top_p         restrict the draw
    order                which tokens are committed first
    order_temperature    noise in the order "confidence", which makes pictures more varied
    schedule             how many tokens a step commits: "linear" the same number each, "cosine"
                         few at first
    block_length         finish this many tokens before the next are begun; None: all at once
    remask               share of committed tokens that a step may take back; 0 is off
    """

    num_inference_steps: int
    guidance_scale: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    order: OrderName = "confidence"
    order_temperature: float = 0.0
    schedule: ScheduleName = "linear"
    block_length: int | None = None
    remask: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "top_k", "block_length"):
            value = getattr(self, name)
            if value is None and name != "num_inference_steps":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("guidance_scale", "temperature", "top_p", "order_temperature", "remask"):
            value = getattr(self, name)
            if value is None and name == "top_p":
                continue
            number = not isinstance(value, bool) and isinstance(value, int | float)
            if not number or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
            if value < 0 and name != "guidance_scale":
                raise ValueError(f"{name} must not be negative, got {value!r}")
        _check_choice("order", self.order, OrderName)
        _check_choice("schedule", self.schedule, ScheduleName)
        if self.order_temperature and self.order != "confidence":
            raise ValueError(
                f"order_temperature {self.order_temperature} belongs to order 'confidence', "
                f"not to {self.order!r}; set it to 0"
            )
        self.sampler()  # it checks the ranges

    def sampler(self, *, suppressed: tuple[int, ...] = ()) -> Sampler:
        """The sampler that these values describe; ids in `suppressed` are never generated."""
        orders: dict[OrderName, Order] = {
            "confidence": Confidence(self.order_temperature),
            "margin": Margin(),
            "entropy": Entropy(),
            "random": Random(),
            "left_to_right": LeftToRight(),
        }
        rules: dict[ScheduleName, CommitRule] = {
            "linear": EvenSplit(),
            "cosine": ScheduledCount(Cosine()),
        }
        return Sampler(
            steps=self.num_inference_steps,
            block_length=self.block_length,
            order=orders[self.order],
            commit=rules[self.schedule],
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            guidance_scale=self.guidance_scale,
            remask=Remasking(self.remask) if self.remask else None,
            suppressed=suppressed,
        )


@dataclass(frozen=True)
class Defaults:
    """What each task does unless told otherwise, and how pictures meet texts of any length.

    A checkpoint may carry its own in generation.json: {"caption": {"temperature": 0.5}}; what is
    not there stays as it is here.

    fit              how a picture meets the tokenizer's square, see `mmdlm.vision.pixels`
    max_text_tokens  length of a caption, its end included, where the checkpoint does not fix it
    """

    text_to_image: Decoding = Decoding(
        12, guidance_scale=2.0, temperature=0.5, order_temperature=1.0, schedule="cosine"
    )
    inpaint: Decoding = Decoding(
        12, guidance_scale=2.0, temperature=0.5, order_temperature=1.0, schedule="cosine"
    )
    caption: Decoding = Decoding(16)
    infill: Decoding = Decoding(16)
    fit: Fit = "pad"
    max_text_tokens: int = 64

    def __post_init__(self) -> None:
        _check_choice("fit", self.fit, Fit)
        tokens = self.max_text_tokens
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 2:
            raise ValueError(f"max_text_tokens must be a whole number above 1, got {tokens!r}")

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> Defaults:
        """Read a generation.json; without the file, the defaults above.

        Raises ValueError that names the file for what is no JSON, an unknown key or a bad value.
        """
        path = Path(path)
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:  # a JSON or a Unicode error is a ValueError
            raise ValueError(f"{path} cannot be read ({error}); mend it or remove it") from error
        try:
            return _updated(cls(), given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _updated(record: Any, given: object, *, where: str = "") -> Any:
    """A frozen dataclass with the entries of a JSON object; unknown ones are errors."""
    if not isinstance(given, Mapping):
        what = where.rstrip(".") or "the file"
        raise ValueError(f"{what} must hold an object {{...}}, not {given!r}")
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    for name, value in given.items():
        if name not in values:
            raise ValueError(f"unknown key {where + name!r}; known are {', '.join(values)}")
        old = values[name]
        values[name] = (
            _updated(old, value, where=f"{where}{name}.") if isinstance(old, Decoding) else value
        )
    try:
        return type(record)(**values)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
