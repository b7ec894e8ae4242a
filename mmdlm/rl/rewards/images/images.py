"""Images among completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image


def images_of(completions: Sequence[Any]) -> list[Image.Image]:
    """Return the completions as RGB images; ValueError names the first that is not one."""
    for n, one in enumerate(completions):
        if not isinstance(one, Image.Image):
            raise ValueError(
                f"completion {n} is {type(one).__name__}, not an image; this reward is for "
                "text-to-image"
            )
        if one.mode != "RGB":
            raise ValueError(f"completion {n} is an image of mode {one.mode}; convert it to RGB")
    return list(completions)
