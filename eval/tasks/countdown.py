"""Benchmark: Countdown, an expression of some numbers that is worth a target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from data_pipelines.countdown import Style, read_countdown, to_problem
from eval.tasks.benchmark import Benchmark
from eval.tasks.task import Task
from mmdlm.rl.reward import Rubric
from mmdlm.rl.rewards.answers.countdown import Countdown as Right
from mmdlm.tasks.countdown import Countdown, Split, make_problems, solve

MEASURES = {"right": "expression right, each number used once"}


def benchmark(
    problems: Sequence[Countdown],
    *,
    style: Style = "d1",
    made: Mapping[str, Any] = MappingProxyType({}),
) -> Benchmark:
    """How many of the problems have a solution at all is reported, and how they were `made`."""
    sizes = Counter(len(one.numbers) for one in problems)
    return Benchmark(
        name="countdown",
        problems=tuple(to_problem(one, style=style) for one in problems),
        rubric=Rubric({"right": Right(wrong=0.0, equation=True, loose=True)}, on_error="raise"),
        measures=MEASURES,
        facts={
            "solvable": sum(solve(one.numbers, one.target) is not None for one in problems),
            "numbers": {str(n): sizes[n] for n in sorted(sizes)},
            "style": style,
            **made,
        },
    )


@dataclass(frozen=True, kw_only=True)
class CountdownTask(Task):
    """Measure how often a model solves Countdown.

    Args:
        data: A jsonl with input "30,100,93" and output "23"; default: problems that can be solved,
            made by the seed.
        style: How a problem is asked: as d1 evaluates, as it trains, or in one short line.
        split: For problems that are made: one of ten is held out, by sha256.
        count: Number of problems that are made.
        numbers: Of each of them.
        largest: Of the numbers.
        targets: Least and largest.
    """

    task: str = "countdown"
    data: Path | None = None
    style: Style = "d1"
    split: Split = "held_out"
    count: int = 256
    numbers: int = 3
    largest: int = 100
    targets: tuple[int, int] = (10, 100)

    def _benchmark(self) -> Benchmark:
        if self.data is not None:
            return benchmark(read_countdown(self.data), style=self.style)
        made = make_problems(
            self.count,
            split=self.split,
            numbers=self.numbers,
            largest=self.largest,
            targets=self.targets,
            generator=torch.Generator().manual_seed(self.asked.seed),
        )
        how = {
            "split": self.split,
            "largest": self.largest,
            "targets": list(self.targets),
            "seed": self.asked.seed,
        }
        return benchmark(made, style=self.style, made=how)
