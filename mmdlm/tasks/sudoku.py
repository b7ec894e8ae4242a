"""4x4 Sudoku: grids, all solutions of a puzzle, new puzzles, and the grid in an answer."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import permutations
from typing import Literal

import torch

from mmdlm.tasks.answers import boxed, tagged

CELLS = 16
GRID = re.compile(r"[1-4]{16}")
HELD_OUT = 48  # grids of 288; the other 240 are for training
FEWEST_GIVENS = 4  # with fewer no puzzle has one solution

Split = Literal["train", "held_out"]


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

    Args:
        completion: What a model has written.
        loose: Where no answer is marked, the last 16 of 1-4 in a row, but for spaces, commas and
            bars.

    Returns:
        The digits, or None.
    """
    inside = tagged(completion)
    if inside is None:
        inside = boxed(completion)
    if inside is None:
        found = GRID.findall(re.sub(r"[\s|,]+", "", completion)) if loose else []
        return found[-1] if found else None
    return re.sub(r"[^0-9]", "", inside) or None


@dataclass(frozen=True)
class Puzzle:
    """16 characters, row by row, 0 for an empty cell; and a solution."""

    cells: str
    solution: str

    @property
    def blanks(self) -> int:
        """Number of empty cells."""
        return self.cells.count("0")

    @property
    def ambiguous(self) -> bool:
        """It has several solutions."""
        return len(solutions(self.cells)) > 1


@cache
def split_grids(split: Split) -> tuple[str, ...]:
    """Return the solved grids of a split: the `HELD_OUT` first by their sha256, or the others.

    A puzzle with one solution lies with its grid, so that none of a held-out grid is ever trained
    on, whatever its empty cells.
    """
    order = sorted(grids(), key=lambda grid: hashlib.sha256(grid.encode()).digest())
    chosen = {"train": order[HELD_OUT:], "held_out": order[:HELD_OUT]}
    if split not in chosen:
        raise ValueError(f"split {split!r} is none of {', '.join(chosen)}")
    return tuple(sorted(chosen[split]))


def make_puzzles(
    count: int,
    *,
    split: Split,
    blanks: int | tuple[int, int] = 8,
    generator: torch.Generator,
) -> list[Puzzle]:
    """Make different puzzles with one solution each; grids and empty cells are drawn at random.

    Args:
        count: Number of puzzles.
        split: The part of all grids to draw from; parts do not overlap.
        blanks: Empty cells, or the least and the most of them: the difficulty.
        generator: Random numbers.

    Returns:
        `count` puzzles, no two alike.

    Raises:
        ValueError: Where there are not as many, or none with that many empty cells.
    """
    least, most = (blanks, blanks) if isinstance(blanks, int) else blanks
    if not 1 <= least <= most <= CELLS - FEWEST_GIVENS:
        raise ValueError(
            f"blanks {blanks}: a puzzle with one solution has 1 to {CELLS - FEWEST_GIVENS} empty "
            "cells"
        )
    if count < 0:
        raise ValueError(f"count {count} is below 0")
    among = split_grids(split)
    possible = len(among) * sum(math.comb(CELLS, empty) for empty in range(least, most + 1))
    if count > possible:
        raise ValueError(
            f"count {count}: there are at most {possible:,} puzzles of {least} to {most} blanks; "
            "ask for fewer, or allow other numbers of blanks"
        )
    found: dict[str, Puzzle] = {}
    idle = 0  # draws without a new one
    while len(found) < count:
        grid = among[int(torch.randint(len(among), (), generator=generator))]
        wanted = int(torch.randint(least, most + 1, (), generator=generator))
        cells = _emptied(grid, wanted, generator)
        if cells is None or cells in found:
            idle += 1
            if idle > 1000 + 20 * count:
                raise ValueError(
                    f"only {len(found)} different puzzles of {least} to {most} blanks turned up; "
                    "ask for fewer, or allow other numbers of blanks"
                )
        else:
            found[cells] = Puzzle(cells, grid)
    return list(found.values())


def _emptied(grid: str, blanks: int, generator: torch.Generator) -> str | None:
    """Return the grid without that many cells, at random, while one solution is left."""
    cells = list(grid)
    left = blanks
    for place in torch.randperm(CELLS, generator=generator).tolist():
        if not left:
            break
        kept, cells[place] = cells[place], "0"
        if len(solutions("".join(cells))) > 1:
            cells[place] = kept
        else:
            left -= 1
    return None if left else "".join(cells)
