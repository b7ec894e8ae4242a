"""Rewards for an answer that is the right one to the letter, or is a whole number at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmdlm.rl.reward import text_of
from mmdlm.tasks.answers import answer_of, reference_of
from mmdlm.tasks.math_answers import concluded_number, plain, stated_number

Where = Literal["answer", "last_number", "text"]


@dataclass(frozen=True)
class ExactMatch:
    r"""1 where the answer equals the column `answer`, 0 elsewhere.

    The column may be a bare answer, a GSM8K solution (`#### 72`) or one with a `\boxed`. White
    space counts as one space, and commas between thousands, a leading `$` and a final full stop do
    not count; nothing else is mended: for that there is `MathEquivalence`. An empty answer is
    wrong.

    Attributes:
        where: "answer": in `<answer>` or `\boxed` (see `answer.answer_of`); "last_number": the one
            number that is stated there, or else the last of the completion (see `stated_number`),
            and what is no number as by "answer"; "text": the whole completion, stripped.

    Source: d1's correctness reward (arXiv:2504.12216, appendix), which is 2.0 of this. Departures:
    an answer is found in `\boxed` as well, and a text without an answer is wrong, where d1 compares
    the whole text.
    """

    where: Where = "answer"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        answer: Sequence[str],
        **columns: Any,
    ) -> list[float | None]:
        """[N] scores."""
        return [
            float(self.matches(text_of(one), str(right)))
            for one, right in zip(completions, answer, strict=True)
        ]

    def matches(self, completion: str, right: str) -> bool:
        """Return whether the completion gives the right answer."""
        if self.where == "text":
            return plain(completion) == plain(right)
        found = answer_of(completion)
        wanted = reference_of(right)
        if self.where == "last_number" and (number := stated_number(wanted)) is not None:
            found = concluded_number(completion) if found is None else stated_number(found)
            wanted = number
        return bool(found) and plain(found or "") == plain(wanted)


@dataclass(frozen=True)
class WholeNumber:
    """1 where the answer is written only in digits. Source: d1's integer reward, .5 of this."""

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """[N] scores."""
        answers = [answer_of(text_of(one)) for one in completions]
        return [float(one is not None and one.isascii() and one.isdigit()) for one in answers]
