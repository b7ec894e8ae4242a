"""4x4 Sudoku puzzles with one solution, split by grid, and files of them.

python -m data_pipelines.sudoku --out puzzles.csv --split train --count 10000
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch

from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.shards.shards import write_file
from data_pipelines.sources.problems import D1_BEGUN, Problem, Prompt
from data_pipelines.sources.row_files import Row, read_rows
from mmdlm.cli import recipe as command_line
from mmdlm.rl.rewards.answers.sudoku import CELLS, grids, solutions

HELD_OUT = 48  # grids of 288; the other 240 are for training
FEWEST_GIVENS = 4  # with fewer no puzzle has one solution

Split = Literal["train", "held_out"]
Style = Literal["d1", "plain"]

D1_SUDOKU = """
Please solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string
reading left-to-right, top-to-bottom, where '0' represents empty cells.

Rules:
- Fill empty cells with digits 1-4
- Each row must contain digits 1-4 exactly once
- Each column must contain digits 1-4 exactly once
- Each 2x2 box must contain digits 1-4 exactly once

Important: Your solution must be a COMPLETE 16-character string with only the digits 1-4,
    representing your final solved grid.

Respond in this exact format:
<reasoning>
Your step-by-step solving process
</reasoning>
<answer>
[16-character solution string with no spaces or separators]
</answer>
"""


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
    """The solved grids of a split: the `HELD_OUT` first by their sha256, or the others.

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
    """Different puzzles with one solution each; a grid and its empty cells are drawn at random.

    blanks  empty cells, or the least and the most of them: the difficulty

    Raises ValueError where there are not as many, or none with that many empty cells.
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
    """The grid without that many cells, taken at random as long as one solution is left."""
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


def read_puzzles(path: Path) -> list[Puzzle]:
    """Puzzles of a csv: columns Puzzle and Solution, 16 characters each, 0 for an empty cell.

    Raises ValueError for a puzzle that has no solution, or whose solution is not one.
    """
    return [_puzzle(row) for row in read_rows(path)]


def _puzzle(row: Row) -> Puzzle:
    cells, solution = (str(row[column]).strip() for column in ("Puzzle", "Solution"))
    try:
        right = solutions(cells)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error
    if not right:
        raise ValueError(f"{row.where}: the puzzle {cells!r} has no solution")
    if solution not in right:
        raise ValueError(f"{row.where}: {solution!r} does not solve the puzzle {cells!r}")
    return Puzzle(cells, solution)


def to_csv(puzzles: Sequence[Puzzle]) -> bytes:
    """In the published format."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["Puzzle", "Solution"])
    writer.writerows([one.cells, one.solution] for one in puzzles)
    return file.getvalue().encode()


def to_problem(puzzle: Puzzle, *, style: Style = "d1") -> Problem:
    """How a puzzle is asked: as d1 does, or by its 16 characters alone, for a small model."""
    if style == "plain":
        prompt = Prompt(f"{puzzle.cells}\n", chat=False)
    else:
        question = f"Solve the following Sudoku puzzle: {puzzle.cells}\n"
        prompt = Prompt(f"{D1_SUDOKU}\n\n{question}", begun=D1_BEGUN)
    columns = {"puzzle": puzzle.cells, "solution": puzzle.solution}
    return Problem(puzzle.cells, prompt, columns)


@partial(sole_writer, is_file=True)
def main(
    out: Path,
    *,
    split: Split = "train",
    count: int = 1000,
    blanks: tuple[int, int] = (8, 8),
    seed: int = 0,
) -> None:
    """Write puzzles with one solution each, as csv.

    Args:
        out: The csv file.
        split: Of the 288 solved grids, the 240 for training, or the 48 that are held out.
        count: Number of puzzles, all different.
        blanks: Least and most empty cells.
        seed: Of everything that is drawn at random.
    """
    generator = torch.Generator().manual_seed(seed)
    puzzles = make_puzzles(count, split=split, blanks=blanks, generator=generator)
    write_file(out, lambda file: file.write(to_csv(puzzles)))
    print(f"{out}: {len(puzzles)} puzzles, {split}")


if __name__ == "__main__":
    command_line.run(main)
