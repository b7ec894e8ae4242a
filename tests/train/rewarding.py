"""Rewards that tests name by class path: good ones, bad ones, and one that kills its process.

And what the log of a run has to show of its rewards: `assert_learned`.
"""

from __future__ import annotations

import math
import os
import signal
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageStat

from mmdlm.rl.reward import RewardUnavailable, text_of


@dataclass(frozen=True)
class Letters:
    """The share of a text that is one letter."""

    letter: str = "e"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        texts = [text_of(one) for one in completions]
        return [one.count(self.letter) / max(1, len(one)) for one in texts]


@dataclass(frozen=True)
class SomeLetters(Letters):
    """1 for a text with the letter, 0 for one without."""

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        return [float(self.letter in text_of(one)) for one in completions]


@dataclass(frozen=True)
class Checksum:
    """A number in [0, 1) that follows from the text: only texts that are alike are worth the same.

    So a group of random answers has something to learn from, whatever a model says.
    """

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        return [zlib.crc32(text_of(one).encode()) / 2**32 for one in completions]


@dataclass(frozen=True)
class Brightness:
    """How bright an image is; the mean is noted."""

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
class Lethal:
    """Has nothing to say; in its n-th call of a process it ends that with SIGKILL, once for a mark.

    Stands beside the rewards of texts or of images.
    """

    mark: str = ""
    call: int = 0

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        COUNT.append(1)
        if len(COUNT) == self.call and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [None] * len(completions)


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


# ---- what a log shows of them -------------------------------------------------------------------


def assert_learned(entries: Sequence[dict[str, Any]], rewards: Collection[str]) -> None:
    """The worth of answers gave a gradient, and each reward scored some in every step, with no
    failure: a run survives rewards that raise, and rewards that are equal, and learns nothing.
    """
    assert rewards, "there are no rewards to look at"
    for entry in entries:
        assert entry["prompts/skipped"] == 0, "a prompt cannot be asked"
        for name in rewards:
            where = f"reward {name!r} in step {entry['step']}"
            assert entry[f"rewards/{name}/skipped"] == 0, f"{where} failed"
            assert f"rewards/{name}/mean" in entry, f"{where} says nothing"
    norms = [entry["grad_norm"] for entry in entries]
    assert all(map(math.isfinite, norms)), norms
    spread = [entry["reward_std"] > 0 for entry in entries]
    assert any(spread), "in no step is an answer worth more than another to the same prompt"
    # At the first, no ratio is clipped, and no reference pulls yet.
    assert norms[spread.index(True)] > 0, f"worth moves nothing: {norms}"
