"""Mathematical equivalence, and answers that would never end."""

from __future__ import annotations

import time

import pytest

from mmdlm.rl.reward import RewardUnavailable, Rubric
from mmdlm.rl.rewards import d1, math_equivalence
from mmdlm.rl.rewards.math_equivalence import MathEquivalence

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
