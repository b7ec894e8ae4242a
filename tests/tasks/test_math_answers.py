"""The number that a free text states, in time that grows with its length only."""

from __future__ import annotations

import time

import pytest

from mmdlm.tasks.math_answers import concluded_number, stated_number


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("it is \N{MINUS SIGN}5", "-5"),
        ("it costs -$1,072.50", "-1072.50"),
        ("1{,}072", "1072"),
        ("(3)-2", None),
        ("x = -2", "-2"),
        ("She sells 9 eggs for $2 each: 9*2 = $18.", "18"),
        ("She doesn't eat them, so she has 18.", "18"),
        ("She could buy 18 apples with what is left.", "18"),
        ("half of 36 is 18", "18"),
        ("9 eggs - 2 = 7 eggs", "7"),
        ("So 100% - 82% = 18%", "18"),
        ("1. add 9\n2. it is 18", "18"),
        ("Step 3: 18", "18"),
        ("**Answer: 18**", "18"),
        ("The final answer is $\\boxed{18}$", "18"),
        ("3x6=18", "18"),
        ("5+4=18", None),
        ("10-5", None),
        ("a range of 5-10", None),
        ("7, 18", None),
        ("7 and 18", None),
        ("at 10:18", None),
        ("it is 18, not sure", None),
        ("18 is wrong", None),
        ("<reasoning>it is 18</reasoning>", "18"),
        ("Is it 18?", None),
        ("It's 18!", None),
        ("minus 18", None),
        ("none", None),
    ],
)
def test_the_last_number_of_a_free_text(text: str, found: str | None) -> None:
    assert concluded_number(text) == found


@pytest.mark.parametrize(
    "text", ["9" * 10**5, "=" * 10**5 + "1", "1+" * 10**5 + "1=2", "a " * 10**5]
)
def test_long_texts_take_no_time(text: str) -> None:
    began = time.process_time()
    for of in (stated_number, concluded_number):
        of(text + "18")
    assert time.process_time() - began < 5
