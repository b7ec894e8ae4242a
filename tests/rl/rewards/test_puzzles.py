"""Sudoku and Countdown: as d1's rewards on well-formed answers, and right where those are not."""

from __future__ import annotations

import re

import pytest
import torch

from mmdlm.rl.rewards.answers.countdown import Countdown
from mmdlm.rl.rewards.answers.sudoku import Sudoku
from mmdlm.tasks.sudoku import grids, solutions

PUZZLE, SOLUTION = "1200340021430000", "1234341221434321"
TWICE = "0034341200434321"  # 1 and 2 can change places


def answer(text: str) -> str:
    return f"<reasoning>\nr\n</reasoning>\n<answer>\n{text}\n</answer>\n"


# ---- Sudoku


def published_sudoku(text: str, solution: str, puzzle: str) -> float:
    """d1's reward in our words."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    digits = "".join(one for one in found[-1] if one.isdigit()) if found else ""
    if not digits:
        return 0.0
    digits = (digits + "0" * 16)[:16]
    empty = [n for n in range(16) if puzzle[n] == "0"]
    return sum(digits[n] == solution[n] for n in empty) / len(empty)


def unique_puzzle(seed: int) -> tuple[str, str]:
    generator = torch.Generator().manual_seed(seed)
    grid = grids()[int(torch.randint(288, (), generator=generator))]
    cells = list(grid)
    for place in torch.randperm(16, generator=generator).tolist():
        kept, cells[place] = cells[place], "0"
        if len(solutions("".join(cells))) > 1:
            cells[place] = kept
    return "".join(cells), grid


@pytest.mark.parametrize("seed", range(20))
def test_cells_are_scored_as_published_where_the_solution_is_unique(seed: int) -> None:
    puzzle, solution = unique_puzzle(seed)
    generator = torch.Generator().manual_seed(seed + 100)
    given = [str(int(d)) for d in torch.randint(1, 5, (16,), generator=generator)]
    for text in (
        answer("".join(given)),
        answer("\n".join("".join(given[i : i + 4]) for i in range(0, 16, 4))),
        answer("".join(given)[:9]),
        answer("".join(given) + "1234"),
        answer(solution),
        answer("no digits"),
        "".join(given[:5]),
    ):
        expected = published_sudoku(text, solution, puzzle)
        assert Sudoku()([""], [text], puzzle=[puzzle]) == [pytest.approx(expected)]
    assert Sudoku()([""], [answer(solution)], puzzle=[puzzle]) == [1.0]


def test_any_solution_is_right() -> None:
    assert len(solutions(TWICE)) == 2
    for one in solutions(TWICE):
        assert Sudoku()([""], [answer(one)], puzzle=[TWICE]) == [1.0]
        assert Sudoku(score="grid")([""], [answer(one)], puzzle=[TWICE]) == [1.0]
    assert published_sudoku(answer(solutions(TWICE)[0]), solutions(TWICE)[1], TWICE) == 0.0


def test_a_whole_grid_keeps_the_givens() -> None:
    other = next(grid for grid in grids() if grid[0] != PUZZLE[0])
    texts = [answer(SOLUTION), answer(other), answer(SOLUTION[:15]), answer(SOLUTION + "1")]
    assert Sudoku(score="grid")([""] * 4, texts, puzzle=[PUZZLE] * 4) == [1, 0, 0, 0]


def test_puzzles_that_ask_nothing_are_not_scored() -> None:
    puzzles = [SOLUTION, "11" + "0" * 14]
    assert Sudoku()([""] * 2, [answer(SOLUTION)] * 2, puzzle=puzzles) == [None, None]


def test_grids_without_tags_are_an_option() -> None:
    assert Sudoku()([""], [SOLUTION], puzzle=[PUZZLE]) == [0.0]  # as published
    assert Sudoku(loose=True)([""], [SOLUTION], puzzle=[PUZZLE]) == [1.0]


# ---- Countdown


def published_countdown(text: str, numbers: list[int], target: int) -> float:
    """d1's reward in our words."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if not found:
        return 0.0
    equation = found[-1].strip()
    if sorted(int(n) for n in re.findall(r"\d+", equation)) != sorted(numbers):
        return 0.1
    try:
        if not re.match(r"^[\d+\-*/().\s]+$", equation):
            return 0.1
        value = eval(equation, {"__builtins__": None}, {})
        return 1.0 if abs(value - target) < 1e-5 else 0.1
    except Exception:
        return 0.1


@pytest.mark.parametrize(
    "text",
    [
        answer("30+93-100"),
        answer("93 - (100 - 30)"),
        answer("100-93+30"),
        answer("30+93"),
        answer("30+93-100 = 23"),
        answer("thirty"),
        answer("30+93-100)"),
        "30+93-100",
        answer("1") + answer("30+93-100"),
    ],
)
def test_expressions_are_scored_as_published(text: str) -> None:
    expected = published_countdown(text, [30, 100, 93], 23)
    found = Countdown()([""], [text], numbers=[[30, 100, 93]], target=[23])
    assert found == [expected]


def test_other_operations_of_python_do_not_count() -> None:
    text = answer("2**3")
    assert published_countdown(text, [2, 3], 8) == 1.0
    assert Countdown()([""], [text], numbers=[[2, 3]], target=[8]) == [0.1]


def test_equations_are_an_option() -> None:
    text = answer("30+93-100 = 23")
    reward = Countdown(equation=True)
    assert reward([""], [text], numbers=[["30", "100", "93"]], target=["23"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("3+4+7=14", 1.0),
        ("3+4+7 = 14.", 0.1),  # what is no expression is none on either side
        ("3+4+7 = 7+7 = 14", 1.0),
        ("3+4+7=15", 0.1),
        ("3+4+7=", 0.1),
        ("3+4+7=x", 0.1),
        ("3+4+7=14=15", 0.1),
        ("3+4+7=15=14", 0.1),
        ("3+4=14", 0.1),
        ("14=3+4+7", 0.1),
        ("3+4+7==14", 0.1),
        ("=14", 0.1),
    ],
)
def test_both_sides_of_an_equation_are_looked_at(text: str, score: float) -> None:
    reward = Countdown(equation=True, loose=True)
    for completion in (answer(text), f"\\boxed{{{text}}}"):
        assert reward([""], [completion], numbers=[[3, 4, 7]], target=[14]) == [score]
    bare = reward([""], [text], numbers=[[3, 4, 7]], target=[14])
    assert (bare == [1.0]) == (score == 1.0)


def test_bare_expressions_are_an_option() -> None:
    text = "so I try\n93+30\n30+93-100\nwhich is 23"
    arguments = {"numbers": [[30, 100, 93]], "target": [23]}
    assert Countdown()([""], [text], **arguments) == [0.0]  # as published
    assert Countdown(loose=True)([""], [text], **arguments) == [1.0]
