r"""Rewards for the form of a completion: its tags, each once and in order, and its `\boxed`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmdlm.rl.reward import text_of
from mmdlm.tasks.answers import boxed, tagged


@dataclass(frozen=True)
class Tagged:
    r"""1 where the completion is `<reasoning>...</reasoning>` and then `<answer>...</answer>`.

    Each tag stands once. Without `strict`, white space between the parts is free, and so is what
    follows the last; where the last tag is "think", something has to follow.

    Attributes:
        tags: In their order; ("think",) asks for `<think>...</think>` and an answer after it.
        strict: Each tag on a line of its own, and nothing before or after.
        opened: The prompt ended with the first tag, so that the completion starts inside it.

    Source: d1's strict and soft format rewards, .5 of this each. Departures: reasoning may have
    many lines, where their expressions stop at the first; a tag twice is wrong; the line break at
    the very end, which their strict reward asks for, may be missing.
    """

    tags: tuple[str, ...] = ("reasoning", "answer")
    strict: bool = False
    opened: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tags", tuple(self.tags))  # YAML has lists
        bad = [tag for tag in self.tags if not re.fullmatch(r"[\w-]+", tag)]
        if bad or not self.tags:
            raise ValueError(f"tags {self.tags!r}: give one or more names, without < and >")

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """[N] scores."""
        return [float(self.matches(text_of(one))) for one in completions]

    def matches(self, text: str) -> bool:
        """Return whether the text has this form."""
        if self.opened:
            text = f"<{self.tags[0]}>{text}"
        if any(text.count(f"<{one}>") != 1 or text.count(f"</{one}>") != 1 for one in self.tags):
            return False
        if self.strict:
            parts = r"\n".join(rf"<{one}>\n.*\n</{one}>" for one in self.tags)
            rest = r"\n.*\S.*" if self.tags[-1] == "think" else r"\n?"
            return re.fullmatch(parts + rest, text, flags=re.DOTALL) is not None
        parts = r"\s*".join(rf"<{one}>.*</{one}>" for one in self.tags)
        rest = r".*\S.*" if self.tags[-1] == "think" else ".*"
        return re.fullmatch(r"\s*" + parts + rest, text, flags=re.DOTALL) is not None


@dataclass(frozen=True)
class TagCount:
    """A quarter for each of `<reasoning>`, `</reasoning>`, `<answer>`, `</answer>` in its place.

    A tag counts that occurs once, with a line of its own (nothing need follow the last). Each
    character after `</answer>` costs `trailing` for each of the two answer tags, but for one line
    break.

    Source: d1's xmlcount reward, half of this (4 x .125, less .001 a character). Departure: where
    no line break follows `</answer>`, theirs counts the whole completion as trailing.
    """

    trailing: float = 0.002

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """[N] scores; below 0 for much trailing text."""
        return [self.score(text_of(one)) for one in completions]

    def score(self, text: str) -> float:
        """Of one completion."""
        end = text if text.endswith("\n") else text + "\n"
        marks = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>\n")
        found = [end.count(mark) == 1 for mark in marks]
        found[3] = text.count("\n</answer>") == 1
        after = text.rsplit("\n</answer>", 1)[1].removeprefix("\n") if found[3] else ""
        return 0.25 * sum(found) - self.trailing * len(after) * (found[2] + found[3])


@dataclass(frozen=True)
class BoxedAnswer:
    r"""The mean of 1 for an `<answer>`, and 1 for a `\boxed` in it (without one: anywhere).

    Attributes:
        unboxed: In place of the second where there is no `\boxed`.

    Source: d1's format reward for MATH, which is this. Departure: theirs never sees a `\boxed`, as
    its "\b" is a backspace: it gives .75 with tags and .25 without, whatever they hold.
    """

    unboxed: float = 0.5

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """[N] scores."""
        found: list[float | None] = []
        for one in completions:
            text = text_of(one)
            inside = tagged(text)
            box = boxed(text if inside is None else inside)
            found.append(((inside is not None) + (self.unboxed if box is None else 1.0)) / 2)
        return found
