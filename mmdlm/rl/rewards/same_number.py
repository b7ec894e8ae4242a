"""A reward for an answer that is the right number, whatever stands around it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mmdlm.rl.reward import text_of
from mmdlm.rl.rewards.answer import after_hashes, answer_of, last_number, reference_of

LONGEST = 1000  # digits of a number that is looked at
FRACTION = re.compile(
    r"(-?)\s*\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(-?\d+)\s*/\s*(\d+)"
)


@dataclass(frozen=True)
class SameNumber:
    r"""1 where the answer is the number in the column `answer`: 18, 18.00 and $18 dollars are one.

    last  where no answer is marked, the last number of the completion is it

    An answer is marked by `<answer>`, `\boxed` or `####`; of several numbers in it the last counts.
    A row whose column has no number is None.
    """

    last: bool = False

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        answer: Sequence[str],
        **columns: Any,
    ) -> list[float | None]:
        """[N] scores."""
        found: list[float | None] = []
        for one, right in zip(completions, answer, strict=True):
            wanted = number(reference_of(str(right)))
            given = self.of(text_of(one))
            found.append(None if wanted is None else float(given == wanted))
        return found

    def of(self, completion: str) -> Fraction | None:
        """The number that a completion gives for an answer."""
        marked = answer_of(completion)
        if marked is None:
            marked = after_hashes(completion)
        found = None if marked is None else number(marked)
        return number(completion) if found is None and self.last else found


def number(text: str) -> Fraction | None:
    """The last number in a text, exactly; of a text that is one fraction, its value."""
    if fraction := FRACTION.fullmatch(text.strip().strip("$").strip()):
        sign, *parts = fraction.groups()
        above, below = (int(part[:LONGEST]) for part in parts if part is not None)
        return None if below == 0 else Fraction(-above if sign else above, below)
    found = last_number(text)
    return None if found is None or len(found) > LONGEST else Fraction(found)
