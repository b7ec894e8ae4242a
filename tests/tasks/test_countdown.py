"""Countdown: what expressions are worth, what numbers can make, and problems with a solution."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch

from mmdlm.tasks.countdown import (
    expression_of,
    make_problems,
    reachable,
    solve,
    solves,
    worth,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "text, value, numbers",
    [
        ("2*4-3", 5, (2, 4, 3)),
        ("(1 + 2) * 3", 9, (1, 2, 3)),
        ("100/30", None, (100, 30)),
        ("-3+5", 2, (3, 5)),
        (r"2 \times 3", 6, (2, 3)),
        (r"\frac{6}{3}", 2, (6, 3)),
        ("6\u00f73\u00d72", 4, (6, 3, 2)),
        ("007", 7, (7,)),
    ],
)
def test_expressions_are_worth(text: str, value: int | None, numbers: tuple[int, ...]) -> None:
    found = worth(text)
    assert found is not None
    assert found.numbers == numbers
    if value is not None:
        assert found.value == value


@pytest.mark.parametrize(
    "text",
    [
        "2**3",
        "7//2",
        "1/0",
        "",
        "1+",
        "__import__('os')",
        "1_000",
        "2.5*2",
        "a+b",
        "(" * 150,
        "9" * 300,
        "2(3)",
    ],
)
def test_what_is_no_expression(text: str) -> None:
    assert worth(text) is None


def test_each_number_is_used_once() -> None:
    assert solves("30+93-100", [30, 100, 93], 23)
    assert not solves("93-100", [30, 100, 93], -7)
    assert not solves("30+93-100+30-30", [30, 100, 93], 23)
    assert solves("2*(3/2)", [2, 3, 2], 3)  # 3/2 is exact
    assert not solves("1/3*3+0", [1, 3, 3], 2)


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


def test_expressions_are_found_in_equations_and_last_lines() -> None:
    assert expression_of("\\boxed{1+2=3}", equation=True) == "1+2"
    assert expression_of("1+2=3\n", equation=True, loose=True) == "1+2"
    assert expression_of("none", loose=True) is None
