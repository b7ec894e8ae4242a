"""Sudoku: the grids, their solutions, and puzzles that have one each."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch

from mmdlm.tasks.sudoku import fits, grid_of, grids, make_puzzles, solutions, split_grids

PUZZLE, SOLUTION = "1200340021430000", "1234341221434321"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_there_are_288_grids_and_they_are_all_that_keep_the_rules() -> None:
    assert len(set(grids())) == 288
    rows = ["".join(one) for one in permutations("1234")]
    count = sum(
        fits(a + b + c + d) for a in rows[:1] for b in rows for c in rows for d in rows
    )  # by brute force, of those with first row 1234
    assert count == 288 // 24
    assert all(fits(grid) for grid in grids())


def test_solutions_keep_the_givens() -> None:
    assert solutions(SOLUTION) == (SOLUTION,)
    assert len(solutions("0" * 16)) == 288
    assert solutions("11" + "0" * 14) == ()
    assert SOLUTION in solutions(PUZZLE)
    with pytest.raises(ValueError, match="16 cells"):
        solutions("12")


def test_the_splits_share_no_grid() -> None:
    train, held_out = set(split_grids("train")), set(split_grids("held_out"))
    assert (len(train), len(held_out)) == (240, 48)
    assert train | held_out == set(grids())
    with pytest.raises(ValueError, match="'test'"):
        split_grids("test")  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("blanks", [1, 8, 12])
def test_every_puzzle_has_one_solution_of_its_split(split: Any, blanks: int) -> None:
    puzzles = make_puzzles(100, split=split, blanks=blanks, generator=seeded())
    assert len({one.cells for one in puzzles}) == 100
    for one in puzzles:
        assert solutions(one.cells) == (one.solution,)
        assert one.solution in split_grids(split)
        assert one.blanks == blanks
        assert not one.ambiguous


def test_the_generator_decides() -> None:
    first, again, other = (
        make_puzzles(20, split="train", blanks=(4, 10), generator=seeded(n)) for n in (0, 0, 1)
    )
    assert first == again != other
    assert {one.blanks for one in first} > {5, 9} or len({one.blanks for one in first}) > 3


@pytest.mark.parametrize("blanks", [0, 13, (6, 5)])
def test_numbers_of_blanks_that_no_puzzle_has(blanks: Any) -> None:
    with pytest.raises(ValueError, match="1 to 12"):
        make_puzzles(1, split="train", blanks=blanks, generator=seeded())


def test_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="count 1000: there are at most 768 puzzles"):
        make_puzzles(1000, split="held_out", blanks=1, generator=seeded())


def test_grids_are_found_without_tags_too() -> None:
    rows = "1234\n3412\n2143\n4321"
    assert grid_of(rows, loose=True) == "1234341221434321"
    assert grid_of("| 1 2 | 3 4 | nothing", loose=True) is None
    assert grid_of(rows) is None
    assert grid_of("\\boxed{1234 3412 2143 4321}") == "1234341221434321"
