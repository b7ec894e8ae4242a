"""The reward for filling a 4x4 Sudoku."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmdlm.rl.reward import text_of
from mmdlm.tasks.sudoku import CELLS, grid_of, solutions


@dataclass(frozen=True)
class Sudoku:
    """How much of a puzzle (the column `puzzle`, 16 characters, 0 is empty) is right.

    Where a puzzle has several solutions any of them is right, and the cells are compared with the
    one that the answer is nearest to. An answer of more digits than 16 is cut off, one of fewer has
    the rest wrong. A puzzle without an empty cell or without a solution is None.

    Attributes:
        score: "cells": the share of the empty cells that are; "grid": 1 if all are and the givens
            are kept, else 0.
        loose: An answer need not be marked, see `grid_of`.

    Source: d1's Sudoku reward, which is "cells"; departure: it knows one solution of each puzzle.
    """

    score: Literal["cells", "grid"] = "cells"
    loose: bool = False

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        puzzle: Sequence[str],
        **columns: Any,
    ) -> list[float | None]:
        """[N] scores."""
        return [
            self.of(grid_of(text_of(one), loose=self.loose), str(which))
            for one, which in zip(completions, puzzle, strict=True)
        ]

    def of(self, grid: str | None, puzzle: str) -> float | None:
        """Return the score of one answer."""
        right = solutions(puzzle)
        empty = [n for n, digit in enumerate(puzzle) if digit == "0"]
        if not right or not empty:
            return None
        if grid is None:
            return 0.0
        if self.score == "grid":
            return float(grid in right)
        grid = grid[:CELLS].ljust(CELLS, "0")
        return max(sum(grid[n] == one[n] for n in empty) for one in right) / len(empty)
