"""Job: files of 4x4 Sudoku puzzles with one solution, and how a puzzle is asked.

python -m data_pipelines.sudoku --out puzzles.csv --split train --count 10000
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.sources.problems import D1_BEGUN, Problem, Prompt
from data_pipelines.sources.row_files import Row, read_rows
from mmdlm.atomic_files import atomic_write
from mmdlm.cli import recipe as command_line
from mmdlm.tasks.sudoku import Puzzle, Split, make_puzzles, solutions

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
    """How a puzzle is asked: as d1 does, or by only its 16 characters, for a small model."""
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
    atomic_write(out, lambda file: file.write(to_csv(puzzles)))
    print(f"{out}: {len(puzzles)} puzzles, {split}")


if __name__ == "__main__":
    command_line.run(main)
