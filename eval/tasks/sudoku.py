"""Benchmark: 4x4 Sudoku, whole grids and cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from data_pipelines.sudoku import Style, read_puzzles, to_problem
from eval.tasks.benchmark import Benchmark
from eval.tasks.task import Task
from mmdlm.rl.reward import Rubric
from mmdlm.rl.rewards.answers.sudoku import Sudoku
from mmdlm.tasks.sudoku import Puzzle, Split, make_puzzles

MEASURES = {
    "grid": "whole grid right, givens kept",
    "cells": "empty cells right",
}


def benchmark(
    puzzles: Sequence[Puzzle],
    *,
    style: Style = "d1",
    made: Mapping[str, Any] = MappingProxyType({}),
) -> Benchmark:
    """Return a benchmark of puzzles; `made` says how they came about, for the report.

    Where a puzzle has several solutions, any is right; how many have is reported.
    """
    blanks = Counter(one.blanks for one in puzzles)
    return Benchmark(
        name="sudoku",
        problems=tuple(to_problem(one, style=style) for one in puzzles),
        rubric=Rubric(
            {"grid": Sudoku("grid", loose=True), "cells": Sudoku("cells", loose=True)},
            on_error="raise",
        ),
        measures=MEASURES,
        facts={
            "puzzles_with_one_solution": sum(not one.ambiguous for one in puzzles),
            "puzzles_with_several_solutions": sum(one.ambiguous for one in puzzles),
            "different_solutions": len({one.solution for one in puzzles}),
            "blanks": {str(n): blanks[n] for n in sorted(blanks)},
            "style": style,
            **made,
        },
    )


@dataclass(frozen=True, kw_only=True)
class SudokuTask(Task):
    """Measure how much of 4x4 Sudoku puzzles a model fills in right.

    Args:
        data: A csv with the columns Puzzle and Solution, 16 characters each, 0 for an empty cell;
            default: puzzles with one solution, made by the seed.
        style: How a puzzle is asked: as d1 does, or by only its 16 characters.
        split: Of the grids, for puzzles that are made: 240 are for training, 48 held out.
        count: Number of puzzles that are made.
        blanks: Least and most of their empty cells.
    """

    task: str = "sudoku"
    data: Path | None = None
    style: Style = "d1"
    split: Split = "held_out"
    count: int = 500
    blanks: tuple[int, int] = (8, 8)

    def _benchmark(self) -> Benchmark:
        if self.data is not None:
            return benchmark(read_puzzles(self.data), style=self.style)
        seed = self.asked.seed
        made = make_puzzles(
            self.count,
            split=self.split,
            blanks=self.blanks,
            generator=torch.Generator().manual_seed(seed),
        )
        return benchmark(made, style=self.style, made={"split": self.split, "seed": seed})
