"""A reward for an image that its own model reads as what it was asked to draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from mmdlm.rl.rewards.images.images import images_of

Describe = Callable[[Sequence[Image.Image]], Sequence[str]]


@dataclass(frozen=True)
class RoundTrip:
    """How well the model's caption of the image agrees with the column `name`.

    `describe`, images -> captions, is given by the recipe: the model that drew them, so that it
    is its own judge; a model that draws and reads the same wrong thing is rewarded, which is why a
    image's own reward or a held-out score belongs beside it. Captions are logged as the column
    `round_trip/caption`.

    Attributes:
        score: "words": the F1 of their words, in any order; "exact": 1 if they are the same, else
            0.

    Source: the self-reward of Lumina-DiMOO (arXiv:2510.06308), by words here, where it asks
    questions.
    """

    score: Literal["words", "exact"] = "words"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        name: Sequence[str],
        describe: Describe,
        log_extra: Callable[[str, list[str]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """[N] scores."""
        captions = list(describe(images_of(completions)))
        if len(captions) != len(completions):
            raise ValueError(f"{len(captions)} captions of {len(completions)} images")
        if log_extra is not None:
            log_extra("round_trip/caption", captions)
        pairs = zip(captions, name, strict=True)
        if self.score == "exact":
            return [float(caption.split() == right.split()) for caption, right in pairs]
        return [word_f1(caption, right) for caption, right in pairs]


def word_f1(one: str, other: str) -> float:
    """F1 of the words of two texts, counted as often as they occur; 1 for the same words."""
    words, others = Counter(one.split()), Counter(other.split())
    total = words.total() + others.total()
    return 2 * (words & others).total() / total if total else 1.0
