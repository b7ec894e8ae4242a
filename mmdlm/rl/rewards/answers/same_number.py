"""A reward for an answer that is the right number, whatever stands around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mmdlm.rl.reward import text_of
from mmdlm.tasks.answers import after_hashes, answer_of, reference_of
from mmdlm.tasks.math_answers import concluded_number, stated_number, value_of


@dataclass(frozen=True)
class SameNumber:
    r"""1 where the answer is the number in the column `answer`: 18, 18.00 and $18 dollars are one.

    An answer is marked by `<answer>`, `\boxed` or `####`, and states one number: what it hedges,
    negates or computes with is wrong (see `stated_number`). A row whose column has no number is
    None.

    Attributes:
        last: Where no answer is marked, the last number of the completion is it.
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
            reference = reference_of(str(right))
            wanted = _value(stated_number(reference) or concluded_number(reference))
            given = self.of(text_of(one))
            found.append(None if wanted is None else float(given == wanted))
        return found

    def of(self, completion: str) -> Fraction | None:
        """Return the number that a completion gives for an answer."""
        marked = answer_of(completion)
        if marked is None:
            marked = after_hashes(completion)
        if marked is not None:
            return _value(stated_number(marked))
        return _value(concluded_number(completion)) if self.last else None


def _value(number: str | None) -> Fraction | None:
    return None if number is None else value_of(number)
