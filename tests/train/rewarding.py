"""Rewards that tests name by class path: good ones, bad ones, and one that kills its process."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageStat

from mmdlm.rl.reward import RewardUnavailable


@dataclass(frozen=True)
class Letters:
    """The share of a text that is one letter."""

    letter: str = "e"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        return [one.count(self.letter) / max(1, len(one)) for one in completions]


@dataclass(frozen=True)
class SomeLetters(Letters):
    """1 for a text with the letter, 0 for one without."""

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        return [float(self.letter in one) for one in completions]


@dataclass(frozen=True)
class Brightness:
    """How bright a picture is; the mean is noted."""

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Image.Image],
        *,
        log_metric: Callable[[str, float], None],
        **columns: Any,
    ) -> list[float | None]:
        found = [ImageStat.Stat(one.convert("L")).mean[0] / 255 for one in completions]
        log_metric("brightness", sum(found) / len(found))
        return list(found)


@dataclass(frozen=True)
class Always:
    """The same for all."""

    value: float = 1.0

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        return [self.value] * len(completions)


@dataclass(frozen=True)
class Lethal(Letters):
    """`Letters`; in its n-th call of a process it ends that with SIGKILL, once for a mark."""

    mark: str = ""
    call: int = 0

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        COUNT.append(1)
        if len(COUNT) == self.call and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(prompts, completions, **columns)


COUNT: list[int] = []


@dataclass(frozen=True)
class Unavailable(Always):
    """Lacks a package."""

    def prepare(self) -> None:
        raise RewardUnavailable("reward 'a' needs a package that is not there")


def broken(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Raises."""
    raise RuntimeError("the server\nis down")


def short(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """One score too few."""
    return [1.0] * (len(completions) - 1)


def undefined(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """The first is NaN."""
    return [math.nan, *[1.0] * (len(completions) - 1)]


def asking(
    prompts: Sequence[Any], completions: Sequence[Any], *, solution: Sequence[str], **columns: Any
) -> list[float]:
    """Needs a column."""
    return [1.0] * len(completions)
