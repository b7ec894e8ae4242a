"""4x4 Sudoku: what a grid is, all solutions of a puzzle, and the reward for filling it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import permutations
from typing import Any, Literal

from mmdlm.rl.reward import text_of
from mmdlm.rl.rewards.answers.answer import boxed, tagged

CELLS = 16
GRID = re.compile(r"[1-4]{16}")


@cache
def grids() -> tuple[str, ...]:
    """All 288 solved grids, rows one after the other, in order."""
    rows = ["".join(one) for one in permutations("1234")]
    found = [""]
    for _ in range(4):
        found = [grid + row for grid in found for row in rows if fits(grid + row)]
    return tuple(found)


def fits(cells: str) -> bool:
    """No row, column or 2x2 box holds a digit twice; `0` and what is missing are open."""
    return all(
        len(digits) == len(set(digits))
        for unit in UNITS
        for digits in [[cells[i] for i in unit if i < len(cells) and cells[i] != "0"]]
    )


UNITS = tuple(
    [tuple(range(4 * n, 4 * n + 4)) for n in range(4)]
    + [tuple(range(n, CELLS, 4)) for n in range(4)]
    + [tuple(8 * r + 2 * c + i for i in (0, 1, 4, 5)) for r in range(2) for c in range(2)]
)
"""Places of the four rows, four columns and four boxes."""


@lru_cache(maxsize=1 << 16)
def solutions(puzzle: str) -> tuple[str, ...]:
    """All grids that keep the givens of a puzzle of 16 characters, 0 for an empty cell.

    Raises ValueError for anything else.
    """
    if not re.fullmatch(r"[0-4]{16}", puzzle):
        raise ValueError(
            f"{puzzle!r} is no 4x4 puzzle; write its 16 cells row by row, 0 for an empty one"
        )
    left = (1 << len(grids())) - 1
    for cell, digit in zip(_holders(), puzzle, strict=True):
        if digit != "0":
            left &= cell[digit]
    return tuple(grid for n, grid in enumerate(grids()) if left >> n & 1)


@cache
def _holders() -> tuple[dict[str, int], ...]:
    """For each cell: digit -> the grids that have it there, as bits."""
    return tuple(
        {
            digit: sum(1 << n for n, grid in enumerate(grids()) if grid[place] == digit)
            for digit in "1234"
        }
        for place in range(CELLS)
    )


def grid_of(completion: str, *, loose: bool = False) -> str | None:
    r"""Return the digits of the answer, in `<answer>` or `\boxed`; None if there are none.

    Every digit counts, whatever separates them.

    loose  where no answer is marked, the last 16 of 1-4 in a row, but for spaces, commas and bars
    """
    inside = tagged(completion)
    if inside is None:
        inside = boxed(completion)
    if inside is None:
        found = GRID.findall(re.sub(r"[\s|,]+", "", completion)) if loose else []
        return found[-1] if found else None
    return re.sub(r"[^0-9]", "", inside) or None


@dataclass(frozen=True)
class Sudoku:
    """How much of a puzzle (the column `puzzle`, 16 characters, 0 is empty) is right.

    score  "cells": the share of the empty cells that are; "grid": 1 if all are and the givens are
           kept, else 0
    loose  an answer need not be marked, see `grid_of`

    Where a puzzle has several solutions any of them is right, and the cells are compared with the
    one that the answer is nearest to. An answer of more digits than 16 is cut off, one of fewer has
    the rest wrong. A puzzle without an empty cell or without a solution is None.

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
