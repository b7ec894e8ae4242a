"""The reward for an expression of some numbers, each used once, that is worth the target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmdlm.rl.reward import text_of
from mmdlm.tasks.countdown import expression_of, solves


def whole_numbers(given: str | Sequence[int | str]) -> list[int]:
    """Numbers as a column has them: a list, or a text such as "30,100,93"."""
    parts = re.split(r"[,\s]+", given.strip(" []")) if isinstance(given, str) else given
    try:
        return [int(one) for one in parts]
    except (TypeError, ValueError):
        raise ValueError(
            f'numbers {given!r} are no whole numbers; write [30, 100, 93] or "30,100,93"'
        ) from None


@dataclass(frozen=True)
class Countdown:
    r"""1 for an expression that solves the columns `numbers` and `target`, `wrong` for another.

    A completion without an answer gets 0.

    Attributes:
        wrong: Of an answer in its tags (or box) that is not right.
        equation: An answer may be written `a + b = c`, where both sides are looked at.
        loose: An answer need not be marked, see `expression_of`.

    Source: d1's Countdown reward. Departures: the sum is exact (theirs is right to 1e-5), an answer
    may stand in `\\boxed`, and only + - * / and parentheses are known, where theirs, which runs the
    answer as Python, takes ** and // as well.
    """

    wrong: float = 0.1
    equation: bool = False
    loose: bool = False

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        numbers: Sequence[Sequence[int]],
        target: Sequence[int],
        **columns: Any,
    ) -> list[float | None]:
        """[N] scores."""
        return [
            self.of(text_of(one), whole_numbers(some), int(wanted))
            for one, some, wanted in zip(completions, numbers, target, strict=True)
        ]

    def of(self, completion: str, numbers: Sequence[int], target: int) -> float:
        """Return the score of one completion."""
        expression = expression_of(completion, equation=self.equation, loose=self.loose)
        if expression is None:
            return 0.0
        return 1.0 if solves(expression, numbers, target) else self.wrong
