"""Benchmark: Countdown, an expression of some numbers that is worth a target.

python -m eval.tasks.countdown --model CHECKPOINT --data problems.jsonl
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from data_pipelines.countdown import (
    Countdown,
    Split,
    Style,
    make_problems,
    read_countdown,
    solve,
    to_problem,
)
from eval.tasks.benchmark import Asked, Benchmark, run
from mmdlm.cli import recipe as command_line
from mmdlm.rl.reward import Rubric
from mmdlm.rl.rewards.answers.countdown import Countdown as Right

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


def main(
    model: str,
    *,
    data: Path | None = None,
    out: Path = Path("runs/eval/countdown.json"),
    style: Style = "d1",
    split: Split = "held_out",
    count: int = 256,
    numbers: int = 3,
    largest: int = 100,
    targets: tuple[int, int] = (10, 100),
    asked: Asked = Asked(),
) -> None:
    """Measure how often a model solves Countdown.

    Prints a table, and writes the JSON of --out with every setting; beside it all answers (.jsonl).

    Args:
        model: Bundled name, or the folder of a checkpoint or a run.
        data: A jsonl with input "30,100,93" and output "23"; default: problems that can be solved,
            made by the seed.
        out: JSON file for the result.
        style: How a problem is asked: as d1 evaluates, as it trains, or in one short line.
        split: For problems that are made: one of ten is held out, by sha256.
        count: Number of problems that are made.
        numbers: Of each of them.
        largest: Of the numbers.
        targets: Least and largest.
        asked: How the model is asked.
    """

    def make() -> Benchmark:
        if data is not None:
            return benchmark(read_countdown(data), style=style)
        made = make_problems(
            count,
            split=split,
            numbers=numbers,
            largest=largest,
            targets=targets,
            generator=torch.Generator().manual_seed(asked.seed),
        )
        how = {"split": split, "largest": largest, "targets": list(targets), "seed": asked.seed}
        return benchmark(made, style=style, made=how)

    run(make, model, asked=asked, out=out, data=data)


if __name__ == "__main__":
    command_line.run(main)
