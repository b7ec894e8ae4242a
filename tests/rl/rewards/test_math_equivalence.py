"""Mathematical equivalence, and answers that would never end."""

from __future__ import annotations

import re
import time

import pytest

from mmdlm.rl.reward import RewardUnavailable, Rubric
from mmdlm.rl.rewards.answers import d1, math_equivalence
from mmdlm.rl.rewards.answers.math_equivalence import MathEquivalence

needs_math = pytest.mark.skipif(
    math_equivalence.find_spec("math_verify") is None, reason="the extra math is not installed"
)


@needs_math
@pytest.mark.parametrize(
    "right, given, score",
    [
        (r"\frac{1}{2}", "0.5", 1),
        (r"\frac{1}{2}", "1/2", 1),
        (r"\frac{1}{2}", "2", 0),
        ("x^2+2x", "x(x+2)", 1),
        ("1,072", "1072", 1),
        ("(1,2)", "(1, 2)", 1),
        ("(1,2)", "(2, 1)", 0),
        (r"\sqrt{8}", r"2\sqrt{2}", 1),
        (r"\text{Evelyn}", "Evelyn", 1),
        ("We get $\\boxed{6+9i}$.", "9i+6", 1),
        ("48/2 = 24\n#### 72", "72.0", 1),
        ("5", "\\notatex{{{", 0),
    ],
)
def test_equal_is_equal_however_it_is_written(right: str, given: str, score: float) -> None:
    texts = [f"<answer>\n\\boxed{{{given}}}\n</answer>"]
    assert MathEquivalence()([""], texts, answer=[right]) == [score]


@pytest.mark.slow
@needs_math
def test_an_answer_that_never_ends_costs_its_time_and_no_more() -> None:
    reward = MathEquivalence(seconds=2)
    assert reward.equal("1", "2") is False  # it has started
    began = time.monotonic()
    logged: dict[str, float] = {}
    texts = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{1/2}"]
    found = reward([""] * 2, texts, answer=["1", "0.5"], log_metric=logged.__setitem__)
    assert found == [0, 1]
    assert logged == {"math/timed_out": 1}
    assert time.monotonic() - began < 60


def test_what_is_written_alike_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_equivalence, "find_spec", lambda name: None)
    reward = MathEquivalence(megabytes=1234)  # a worker of its own, which has not started
    texts = ["\\boxed{x+1}", "no answer"]
    assert reward([""] * 2, texts, answer=["$x+1$", "3"]) == [1, 0]
    with pytest.raises(RewardUnavailable, match=r"mmdlm\[math\]"):
        Rubric({"math": reward})([""], ["\\boxed{2}"], columns={"answer": ["x"]})


@needs_math
def test_d1s_rubric_for_math() -> None:
    texts = ["<answer>\\boxed{0.5}</answer>", "\\boxed{1}", "nothing"]
    found = d1.math()([""] * 3, texts, columns={"answer": [r"so \boxed{\frac{1}{2}}"] * 3})
    assert found.total.tolist() == [3.0, 0.5, 0.25]


# ---- the published one, in our own words: the last box of each, as strings after Hendrycks'
# normalization (arXiv:2103.03874, its published code)


BOX = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
REWRITTEN = (
    (r"\n|\\!", ""),
    (r"\\\\", r"\\"),
    (r"[td]frac", "frac"),
    (r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$|\\text\{ .*|\\%", ""),  # and units, to the end
    (r"(^|[ {])\.", r"\g<1>0."),
    (r"^[^=]{1,2}=([^=]*)$", r"\1"),  # what the value is of
    (r"\\sqrt([^{])", r"\\sqrt{\1}"),
    (r" ", ""),
    (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{])\{", r"\\frac{\1}{"),
    (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),
)


def published_math(text: str, solution: str) -> float:
    """d1's correctness of MATH; a text whose last box is not closed, or has none, is compared."""
    sides = []
    for side in (text, solution):
        box = BOX.match(side, max(side.rfind(r"\boxed"), 0))
        side = box[1] if box else side
        for old, new in REWRITTEN:
            side = re.sub(old, new, side)
        sides.append(side)
    return 2.0 * (sides[0] == sides[1])


def ours_math(text: str, solution: str) -> float:
    rubric = d1.math()
    found = rubric(["?"], [text], columns={"answer": [solution]})
    return rubric.weights["correctness"] * float(found.rewards["correctness"][0])


def answered(answer: str) -> str:
    return f"<reasoning>\nr\n</reasoning>\n<answer>\n\\boxed{{{answer}}}\n</answer>"


@needs_math
@pytest.mark.parametrize(
    "right, given, score",
    [
        ("3", "3", 2),
        ("3", "4", 0),
        ("-5", "5", 0),
        ("2", "2,3", 0),
        (r"\frac{1}{2}", r"\dfrac{1}{2}", 2),
        (r"\frac{1}{2}", r"\tfrac12", 2),
        (r"\frac{1}{72}", r"\frac1{72}", 2),
        (r"\frac{1}{2}", "1/2", 2),
        (r"\frac{1}{2}", "0.5", 2),
        (r"\frac{1}{2}", ".5", 2),
        (r"\frac{1}{2}", "2", 0),
        (r"2\sqrt{3}", r"2\sqrt3", 2),
        (r"2\sqrt{3}", r"3\sqrt2", 0),
        ("(1,2)", r"\left(1, 2\right)", 2),
        ("(1,2)", "(2,1)", 0),
        ("[2,5)", "[2, 5]", 0),
        ("10,000", r"10,\!000", 2),
        ("5", "x = 5", 2),
        ("5", "x = 6", 0),
        (r"5\text{ cm}", "5", 2),
        (r"50\%", "50", 2),
        (r"90^\circ", r"90^{\circ}", 2),
        ("18", r"\$18", 2),
        (r"\text{Evelyn}", r"\text{Evelyn}", 2),
        (r"\text{Evelyn}", r"\text{Angela}", 0),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", 2),
        ("x^2+2x", "x^2 + 2x", 2),
        ("x^2+2x", "x^2 - 2x", 0),
    ],
)
def test_well_formed_answers_are_scored_as_published(right: str, given: str, score: float) -> None:
    text, solution = answered(given), f"So we get $\\boxed{{{right}}}$."
    assert published_math(text, solution) == ours_math(text, solution) == score


@needs_math
@pytest.mark.parametrize(
    "right, text, theirs",
    [
        (r"\frac{1}{4}", answered("0.25"), 0),
        (r"\frac{1}{2}", answered(r"\frac{2}{4}"), 0),
        (r"\frac{1}{2}", answered(r"\frac{1}2"), 0),
        (r"\sqrt{8}", answered(r"2\sqrt{2}"), 0),
        ("6+9i", answered("9i+6"), 0),
        ("x^2+2x", answered("x(x+2)"), 0),
        ("1,072", answered("1072"), 0),
        (r"\text{Evelyn}", answered("Evelyn"), 0),
        ("3", "<answer>3</answer>", 0),  # without a box, all of the text is compared
        ("3", answered("3") + r" and \boxed{never closed", 0),
        ("x=3", answered("y=3"), 2),  # two lines, one upright
    ],
)
def test_where_the_published_strings_are_wrong_ours_is_right(
    right: str, text: str, theirs: float
) -> None:
    solution = f"So we get $\\boxed{{{right}}}$."
    assert published_math(text, solution) == theirs
    assert ours_math(text, solution) == 2 - theirs
