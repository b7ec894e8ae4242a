"""Puzzles that are made have what they promise, and files of them read as they were published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines import countdown, sudoku
from data_pipelines.countdown import read_countdown
from data_pipelines.sudoku import read_puzzles
from mmdlm.tasks.countdown import make_problems, reachable, solve, solves
from mmdlm.tasks.sudoku import Puzzle, grids, make_puzzles, solutions, split_grids


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- Sudoku


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


def test_files_of_puzzles(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.csv"
    sudoku.main(path, split="held_out", count=10, blanks=(6, 8), seed=3)
    puzzles = read_puzzles(path)
    assert puzzles == make_puzzles(10, split="held_out", blanks=(6, 8), generator=seeded(3))
    assert path.read_text().splitlines()[0] == "Puzzle,Solution"


def test_a_published_puzzle_may_have_several_solutions(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text("Puzzle,Solution\n0034341200434321,1234341221434321\n")
    (puzzle,) = read_puzzles(path)
    assert puzzle.ambiguous
    assert puzzle == Puzzle("0034341200434321", "1234341221434321")


@pytest.mark.parametrize(
    "text, message",
    [
        ("Puzzle,Solution\n123,1\n", "row 1: '123' is no 4x4 puzzle"),
        ("Puzzle,Solution\n1100000000000000,1234341221434321\n", "has no solution"),
        ("Puzzle,Solution\n0034341200434321,1234341221434322\n", "does not solve"),
        ("puzzle,solution\n1,2\n", "has no 'Puzzle'.*it has puzzle, solution"),
        ("Puzzle,Solution\n1\n", "more or fewer fields"),
        ("Puzzle,Solution\n", "holds no problems"),
    ],
)
def test_bad_files_of_puzzles(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_puzzles(path)


def test_a_puzzle_is_asked_as_d1_asks() -> None:
    problem = sudoku.to_problem(Puzzle("0" * 16, grids()[0]))
    assert problem.prompt.chat
    assert problem.prompt.begun == "<reasoning>"
    assert problem.prompt.text.startswith("\nPlease solve the following 4x4 Sudoku puzzle. ")
    assert problem.prompt.text.endswith(f"Solve the following Sudoku puzzle: {'0' * 16}\n")
    plain = sudoku.to_problem(Puzzle("0" * 16, grids()[0]), style="plain").prompt
    assert (plain.text, plain.chat) == ("0" * 16 + "\n", False)


# ---- Countdown


def test_all_that_two_numbers_make() -> None:
    assert {float(value) for value in reachable([6, 3])} == {9, 3, -3, 18, 2, 0.5}
    assert {int(value) for value in reachable([6, 3], whole=True)} == {9, 3, -3, 18, 2}


def test_every_expression_is_worth_its_value() -> None:
    for value, expression in reachable([7, 3, 11, 5]).items():
        if value.denominator == 1:
            assert solves(expression, [7, 3, 11, 5], int(value)), expression


def test_the_search_is_complete() -> None:
    """Against all expressions of three numbers, by brute force over both shapes."""
    found = set()
    numbers = [8, 3, 5]
    from itertools import permutations, product

    for (a, b, c), f, g in product(permutations(numbers), "+-*/", "+-*/"):
        for text in (f"({a}{f}{b}){g}{c}", f"{a}{f}({b}{g}{c})"):
            try:
                found.add(round(eval(text), 9))
            except ZeroDivisionError:
                continue
    assert {round(float(value), 9) for value in reachable(numbers)} == found


def test_hard_ones_are_solved() -> None:
    assert solve([30, 100, 93], 23) is not None
    assert solve([3, 3, 8, 8], 24) == "8/(3-8/3)"
    assert solve([1, 1, 1], 100) is None
    with pytest.raises(ValueError, match="1 to 5"):
        solve([1] * 6, 1)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [3, 4])
def test_every_problem_can_be_solved(numbers: int) -> None:
    made = make_problems(50, split="train", numbers=numbers, largest=50, generator=seeded())
    assert len({(tuple(sorted(one.numbers)), one.target) for one in made}) == 50
    for one in made:
        assert len(one.numbers) == numbers
        assert 10 <= one.target <= 100
        assert solves(one.solution, one.numbers, one.target)
        assert not one.held_out


def test_held_out_problems_are_others() -> None:
    held_out = make_problems(20, split="held_out", generator=seeded())
    assert all(one.held_out for one in held_out)
    assert held_out == make_problems(20, split="held_out", generator=seeded())
    with pytest.raises(ValueError, match="turned up"):
        make_problems(50, split="train", numbers=2, largest=2, generator=seeded())


def test_files_of_countdown(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    countdown.main(path, split="held_out", count=5, seed=1)
    made = make_problems(5, split="held_out", generator=seeded(1))
    read = read_countdown(path)
    assert [(one.numbers, one.target) for one in read] == [
        (one.numbers, one.target) for one in made
    ]
    first = json.loads(path.read_text().splitlines()[0])
    assert list(first) == ["input", "output", "solution"]
    assert solves(
        first["solution"], [int(n) for n in first["input"].split(",")], int(first["output"])
    )


@pytest.mark.parametrize(
    "line",
    [
        '{"input": "30,100,93", "output": "23"}',
        '{"nums": [30, 100, 93], "target": 23}',
        '{"input": "30,100,93,23", "output": "100-93=7,30-7=23"}',
    ],
)
def test_published_formats_of_countdown(line: str, tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(line + "\n\n")
    (one,) = read_countdown(path)
    assert (one.numbers, one.target) == ((30, 100, 93), 23)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"input": "1,b", "output": "3"}', "line 1 is no Countdown problem"),
        ('{"input": "1,2"}', "line 1 has no 'output'"),
        ("{", "line 1: no JSON"),
        ("[1]", "line 1: no object but list"),
        ("", "holds no problems"),
    ],
)
def test_bad_files_of_countdown(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_countdown(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_countdown(tmp_path / "absent.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"not \.jsonl, \.json or \.csv"):
        read_countdown(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="UTF-8"):
        read_countdown(tmp_path / "a.jsonl")


def test_countdown_is_asked_as_d1_asks() -> None:
    one = countdown.Countdown((30, 100, 93), 23)
    evaluated = countdown.to_problem(one).prompt
    assert evaluated.text.endswith("</answer>\n\nNumbers: [30, 100, 93]\nTarget: 23")
    assert "For example: \\boxed{a + b * c}Respond in the following format:\n<reason" in (
        evaluated.text
    )
    trained = countdown.to_problem(one, style="d1_train").prompt
    assert "\nUsing only the numbers [30, 100, 93], create an arithmetic" in trained.text
    assert trained.begun == ""
