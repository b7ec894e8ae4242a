"""d1's rewards, as rubrics with the published weights.

Source: arXiv:2504.12216, appendix, and its published code; where that code is wrong, the rewards
here are not: see the classes.
"""

from __future__ import annotations

from mmdlm.rl.reward import Reward, Rubric
from mmdlm.rl.rewards.answers.countdown import Countdown
from mmdlm.rl.rewards.answers.exact_match import ExactMatch, WholeNumber
from mmdlm.rl.rewards.answers.form import BoxedAnswer, TagCount, Tagged
from mmdlm.rl.rewards.answers.math_equivalence import MathEquivalence
from mmdlm.rl.rewards.answers.sudoku import Sudoku


def gsm8k() -> Rubric:
    """At most 4: 2 for the answer, .5 for each of four forms (the count of tags has 4 x .125)."""
    rewards: dict[str, Reward] = {
        "xmlcount": TagCount(),
        "soft_format": Tagged(),
        "strict_format": Tagged(strict=True),
        "int": WholeNumber(),
        "correctness": ExactMatch(),
    }
    weights = dict.fromkeys(rewards, 0.5) | {"correctness": 2.0}
    return Rubric(rewards, weights)


def math() -> Rubric:
    """At most 3: 2 for the answer, 1 for tags and box."""
    return Rubric({"correctness": MathEquivalence(), "format": BoxedAnswer()}, {"correctness": 2.0})


def countdown() -> Rubric:
    """1 for the right expression, .1 for another."""
    return Rubric({"countdown": Countdown()})


def sudoku() -> Rubric:
    """Return the share of empty cells."""
    return Rubric({"sudoku": Sudoku()})
