"""Questions whose answers are right or wrong, for models that are trained here.

In a file of their own, as a config names them by class path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from eval.emoji.gallery import SIZE, Gallery, to_levels
from eval.emoji.measures import NEAREST
from eval.metrics import exact_match
from eval.tasks import countdown, sudoku
from eval.tasks.benchmark import Asked, Asking, Benchmark, ask, rate
from mmdlm.pipeline.model import Model
from mmdlm.rl.rewards.images.neighbors import nearest_neighbors
from mmdlm.tasks.countdown import make_problems
from mmdlm.tasks.sudoku import make_puzzles


class Questions(ABC):
    """Questions whose answers are right or wrong.

    Attributes:
        steps: Denoising steps of an answer; of a text they commit one token each.
    """

    model: str
    steps: int

    @abstractmethod
    def answers(
        self, model: Model, *, generator: torch.Generator
    ) -> tuple[list[str] | None, Tensor]:
        """Return what the model says, None if it draws, and what of it is right, [N] bool."""


@dataclass(frozen=True)
class Solve(Questions):
    """Puzzles that are made: `count` of the held-out ones."""

    model: str
    steps: int
    count: int = 500
    batch_size: int = 250

    @abstractmethod
    def benchmark(self, generator: torch.Generator) -> Benchmark:
        """Its first measure is what is right."""

    def answers(self, model: Model, *, generator: torch.Generator) -> tuple[list[str], Tensor]:
        benchmark = self.benchmark(torch.Generator().manual_seed(0))
        asked = Asked(num_inference_steps=self.steps, batch_size=self.batch_size)
        asking = Asking(model, asked, generator)
        said = ask(benchmark.problems, asking, batch_size=self.batch_size)
        scored = rate(benchmark, said)
        return list(said), scored.breakdown.rewards[next(iter(benchmark.measures))] == 1


@dataclass(frozen=True)
class Sudoku(Solve):
    """4x4 puzzles of held-out grids, as the small model is asked."""

    def benchmark(self, generator: torch.Generator) -> Benchmark:
        puzzles = make_puzzles(self.count, split="held_out", blanks=(8, 8), generator=generator)
        return sudoku.benchmark(puzzles, style="plain")


@dataclass(frozen=True)
class Countdown(Solve):
    """Problems of three held-out numbers, as the small model is asked."""

    def benchmark(self, generator: torch.Generator) -> Benchmark:
        problems = make_problems(self.count, split="held_out", numbers=3, generator=generator)
        return countdown.benchmark(problems, style="plain")


@dataclass(frozen=True)
class WithImage(Questions):
    """Emoji: the held-out ones, and `trained` of the others, at random.

    Attributes:
        shards: With their images, from `data_pipelines.write_shards emoji`.
    """

    shards: str
    model: str = "emoji"
    steps: int = 16
    trained: int = 331
    batch_size: int = 50

    def asked(self) -> tuple[Gallery, list[int]]:
        """All that there are, and which of them the questions are about."""
        gallery = Gallery.read(self.shards)
        split = gallery.split(self.trained, seed=0).values()
        return gallery, [place for places in split for place in places]


@dataclass(frozen=True)
class Captions(WithImage):
    """Names of images."""

    def answers(self, model: Model, *, generator: torch.Generator) -> tuple[list[str], Tensor]:
        gallery, places = self.asked()
        said: list[str] = []
        for start in range(0, len(places), self.batch_size):
            images = [gallery.emoji[i].image for i in places[start : start + self.batch_size]]
            said += model.caption(images, num_inference_steps=self.steps, generator=generator)
        return said, exact_match(said, [gallery.right[i] for i in places])


@dataclass(frozen=True)
class Drawings(WithImage):
    """Images of names; right is one to which the named image is among the nearest."""

    steps: int = 8

    def answers(self, model: Model, *, generator: torch.Generator) -> tuple[None, Tensor]:
        gallery, places = self.asked()
        drawn: list[Image.Image] = []
        for start in range(0, len(places), self.batch_size):
            names = [gallery.emoji[i].name for i in places[start : start + self.batch_size]]
            drawn += model.text_to_image(names, num_inference_steps=self.steps, generator=generator)
        found = nearest_neighbors(
            to_levels(drawn, SIZE), gallery.levels, right=torch.tensor(places), k=1
        )
        return None, found.within(NEAREST)
