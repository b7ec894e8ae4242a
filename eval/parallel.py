"""What committing several tokens at once saves and costs: forward passes, accuracy, repetitions.

python -m eval.parallel --config configs/eval/parallel.yaml
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipelines import command_line
from data_pipelines.countdown import make_problems
from data_pipelines.shards import write_file
from data_pipelines.sudoku import make_puzzles
from eval import countdown, sudoku
from eval.benchmark import Asked, Asking, Benchmark, ask, rate
from eval.emoji import Gallery
from eval.metrics import estimate, exact_match
from eval.passes import counted
from eval.provenance import describe_hardware, describe_model
from mmdlm.generate import Model
from mmdlm.loading import load


class Task(ABC):
    """Questions whose answers are right or wrong.

    steps  denoising steps that commit one token each
    """

    model: str
    steps: int

    @abstractmethod
    def answers(
        self, model: Model, *, steps: int, generator: torch.Generator
    ) -> tuple[list[str], Tensor]:
        """What the model says, and [N] bool, what of it is right."""


@dataclass(frozen=True)
class Solve(Task):
    """Puzzles that are made: `count` of the held-out ones."""

    model: str
    steps: int
    count: int = 500
    batch_size: int = 250

    @abstractmethod
    def benchmark(self, generator: torch.Generator) -> Benchmark:
        """Its first measure is what is right."""

    def answers(
        self, model: Model, *, steps: int, generator: torch.Generator
    ) -> tuple[list[str], Tensor]:
        benchmark = self.benchmark(torch.Generator().manual_seed(0))
        asked = Asked(num_inference_steps=steps, batch_size=self.batch_size)
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
class Captions(Task):
    """Names of emoji: the held-out ones, or all but `trained` at random as well.

    shards  with their pictures, from `data_pipelines.write_shards emoji`
    """

    shards: str
    model: str = "emoji"
    steps: int = 16
    trained: int = 331
    batch_size: int = 50

    def answers(
        self, model: Model, *, steps: int, generator: torch.Generator
    ) -> tuple[list[str], Tensor]:
        gallery = Gallery.read(self.shards)
        places = [place for some in gallery.split(self.trained, seed=0).values() for place in some]
        said: list[str] = []
        for start in range(0, len(places), self.batch_size):
            pictures = [gallery.emoji[i].image for i in places[start : start + self.batch_size]]
            said += model.caption(pictures, num_inference_steps=steps, generator=generator)
        return said, exact_match(said, [gallery.right[i] for i in places])


@dataclass(frozen=True)
class Faster:
    """One way to decode; all None: one token a step."""

    threshold: float | None = None
    factor: float | None = None

    @property
    def name(self) -> str:
        """For the table."""
        given = [f"{name} {value}" for name, value in asdict(self).items() if value is not None]
        return ", ".join(given) or "one token a step"


@dataclass(frozen=True)
class Outcome:
    """What came of one way to decode a task.

    forwards  passes an answer
    right     share
    error     its standard error
    repeats   share of answers in which a word stands twice in a row
    """

    task: str
    decoding: str
    forwards: float
    right: float
    error: float
    repeats: float


def outcome(name: str, task: Task, model: Model, faster: Faster) -> Outcome:
    """Ask all questions of a task."""
    asked, passes = counted(model.faster(threshold=faster.threshold, factor=faster.factor))
    generator = torch.Generator().manual_seed(0)
    said, right = task.answers(asked, steps=task.steps, generator=generator)
    found = estimate(right)
    return Outcome(
        task=name,
        decoding=faster.name,
        forwards=passes.rows / len(said),
        right=found.value,
        error=found.standard_error,
        repeats=sum(map(has_repeats, said)) / len(said),
    )


def has_repeats(text: str) -> bool:
    """Whether a word stands twice in a row."""
    return bool(re.search(r"\b(\w+)\W+\1\b", text, re.IGNORECASE))


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown; each way to decode beside one token a step."""
    lines = [
        "| task | decoding | forwards an answer | right | repeats a word |",
        "|---|---|---|---|---|",
    ]
    usual: dict[str, Outcome] = {}
    for one in outcomes:
        base = usual.setdefault(one.task, one)
        forwards, right = f"{one.forwards:.2f}", f"{100 * one.right:.1f} % ± {100 * one.error:.1f}"
        if one is not base:
            forwards += f" ({base.forwards / one.forwards:.1f} x fewer)"
            right += f" ({100 * (one.right - base.right):+.1f})"
        repeats = f"{100 * one.repeats:.1f} %"
        lines.append(f"| {one.task} | {one.decoding} | {forwards} | {right} | {repeats} |")
    return "\n".join(lines)


def main(
    tasks: dict[str, Task],
    faster: list[Faster],
    *,
    out: Path = Path("runs/eval/parallel.json"),
) -> None:
    """Decode tasks one token a step, then several at once, and print what that saves and costs.

    Args:
        tasks: By name.
        faster: Ways to decode, each beside one token a step.
        out: JSON file for the table.
    """
    if not tasks:
        raise ValueError("there are no tasks; name one at least")
    outcomes: list[Outcome] = []
    models: dict[str, Any] = {}
    with tqdm(total=len(tasks) * (1 + len(faster)), unit="run") as bar:
        for name, task in tasks.items():
            model = load(task.model, device="cpu")
            models[name] = describe_model(task.model, model)
            for way in (Faster(), *faster):
                outcomes.append(outcome(name, task, model, way))
                bar.update()
    report = {
        "outcomes": [asdict(one) for one in outcomes],
        "models": models,
        "hardware": describe_hardware(torch.device("cpu")),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    content = json.dumps(report, indent=2) + "\n"
    write_file(out, lambda file: file.write(content.encode()))
    print(table(outcomes))
    print(out)


if __name__ == "__main__":
    command_line.run(main)
