r"""Numbers that stand for themselves are answers; hedges, negations and calculations are not."""

from __future__ import annotations

import pytest

from mmdlm.rl.rewards.answers.exact_match import ExactMatch
from mmdlm.rl.rewards.answers.math_equivalence import MathEquivalence
from mmdlm.rl.rewards.answers.same_number import SameNumber

RIGHT = [
    *("18", "18.", "18.00", "+18", "$18", "\\$18", "$18$", "18$", "USD18", "€18", "(18)", "[18]"),
    *("**18**", "*18*", "__18__", "`18`", "\\text{18}", "\\mathbf{18}", "\\boxed{18}", "\\(18\\)"),
    *("18 dollars", "18 more", "18 cards left over", "18 times", "18%", "18\\%", "18th", "18kg"),
    *(
        "18 m^2",
        "18\\text{ cm}^2",
        "18 km/h",
        "18 m²",
        "18°C",
        "18^\\circ",
        "18/hour",
        "18 per hour",
    ),
    *(
        "18-year-old",
        "18 years old",
        "it is 18 dollars",
        "It is\n18",
        "Answer: 18",
        "x = 18",
        "$x=18$",
    ),
    *(
        "6*3=18",
        "$6 \\times 3 = 18$",
        "$6 * 3 = $18",
        "20 - 2 = 18",
        "7.5 + 10.5 = 18",
        "18 = 18.0",
    ),
    *("6 x 3 = 18", "36/2", "\\frac{36}{2}", "36/2 = 18", "a total of 18", "18 (eighteen)"),
]
WRONG = [
    *(
        "7 or 18",
        "18 or 7",
        "either 7 or 18",
        "7, 18",
        "18, 7",
        "7 and 18",
        "7\n18",
        "7; 18",
        "7 18",
    ),
    *(
        "not 18",
        "it isn't 18",
        "isn\N{RIGHT SINGLE QUOTATION MARK}t 18",
        "never 18",
        "not 7 but 18",
        "18, not 7",
        "18 is wrong",
    ),
    *("anything but 18", "other than 18", "no 18", "neither 7 nor 18", "18 is not it", "non-18"),
    *("18!", "5^18", "18^2", "18²", "5¹⁸", "2**18", "x**18", "x^18", "18e3", "√18", "|18|", "18!!"),
    *(
        "10:18",
        "18:00",
        "7-18",
        "7\N{EN DASH}18",
        "7 to 18",
        "7/18",
        "18-7",
        "18+1",
        "18 - 1",
        "18 * 2",
        "3 x 18",
    ),
    *("maybe 18", "about 18", "around 18", "approximately 18", "~18", "≈18", "18?", "18 or so"),
    *("possibly 18", "probably 18", "might be 18", "between 7 and 18", "over 18", "at least 18"),
    *("less than 18", "<18", ">18", ">= 18", "≠ 18", "!= 18", "x != 18", "\\neq 18", "\\approx 18"),
    *("18 ± 2", "18 \\pm 2", "minus 18", "negative 18", "-18", "- 18", "\N{MINUS SIGN}18", "--18"),
    *("half of 18", "twice 18", "18 and a half", "18 1/2", "18.5", "18,5", "18 million", "18k"),
    *("18 squared", "18 factorial", "x18", "A-18", "0x18", "18x", "18_000", "1.18.2", "118", "180"),
    *(
        "5*3=18",
        "4 = 18",
        "18 = 19",
        "6*3 = 18 = 17",
        "1/0",
        "18/0",
        "",
        "eighteen",
        "if 18",
        "unless 18",
    ),
]


@pytest.mark.parametrize("text", RIGHT)
def test_a_number_that_stands_for_itself(text: str) -> None:
    marked = [
        f"<answer>{text}</answer>",
        f"#### {text}" if "\n" not in text else f"\\boxed{{{text}}}",
    ]
    assert SameNumber()(["", ""], marked, answer=["18", "#### 18"]) == [1.0, 1.0]


@pytest.mark.parametrize("text", WRONG)
def test_a_number_that_does_not(text: str) -> None:
    marked = [f"<answer>{text}</answer>", f"\\boxed{{{text}}}"]
    assert SameNumber()(["", ""], marked, answer=["18", "18"]) == [0.0, 0.0]
    assert SameNumber(last=True)(["", ""], marked, answer=["18", "18"]) == [0.0, 0.0]
    assert ExactMatch(where="last_number")(["", ""], marked, answer=["18", "18"]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "right", "score"),
    [
        (r"\boxed{\frac{36}{2}}", "2", 0.0),
        ("<answer>-3/4</answer>", "-0.75", 1.0),
        ("<answer>-3/4</answer>", "\\frac{-3}{4}", 1.0),
        ("<answer>\N{MINUS SIGN}5</answer>", "5", 0.0),
        ("<answer>-$1{,}072.50</answer>", "-1072.5", 1.0),
        ("<answer>" + "9" * 5000 + "</answer>", "9", 0.0),
        ("<answer>1/0</answer>", "1", 0.0),
        ("<answer>3</answer>", "no number", None),
    ],
)
def test_the_same_number(completion: str, right: str, score: float | None) -> None:
    assert SameNumber()([""], [completion], answer=[right]) == [score]


@pytest.mark.parametrize("text", ["\\neq 18", "\\approx 18", "18?", "5*3 = 18", "7 or 18", "18!"])
def test_mathematics_knows_hedges_too(text: str) -> None:
    pytest.importorskip("math_verify")
    assert MathEquivalence()([""], [f"\\boxed{{{text}}}"], answer=["18"]) == [0.0]
    assert MathEquivalence()([""], [f"\\boxed{{{text}}}"], answer=[text]) == [1.0]
