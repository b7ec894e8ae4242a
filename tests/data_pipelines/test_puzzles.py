"""Puzzles that are made have what they promise, and files of them read as they were published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipelines import countdown, sudoku
from data_pipelines.countdown import read_countdown
from data_pipelines.sudoku import read_puzzles
from mmdlm.tasks.countdown import make_problems, solves
from mmdlm.tasks.sudoku import Puzzle, grids, make_puzzles


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- Sudoku


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
