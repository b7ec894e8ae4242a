"""Countdown: from some numbers, each used once, an expression that is worth the target."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mmdlm.rl.reward import text_of
from mmdlm.rl.rewards.answers.answer import boxed, tagged

LONGEST = 200  # characters of an expression that is looked at
WRITTEN = (
    (re.compile(r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile("\\\\(?:times|cdot)\\b|[\u00d7\u00b7\u22c5]"), "*"),
    (re.compile(r"\\div\b|÷"), "/"),
    (re.compile("[\u2212\u2013]"), "-"),
    (re.compile(r"\\(?:left|right)\b|\\[()\[\],;! ]|\$"), " "),
)


@dataclass(frozen=True)
class Worth:
    """What an expression is worth, exactly, and the numbers that it is made of, in order."""

    value: Fraction
    numbers: tuple[int, ...]


def worth(expression: str) -> Worth | None:
    r"""Whole numbers, + - * /, parentheses and signs, by the usual rules; None for anything else.

    `\times`, `\div`, `\cdot` and `\frac` are read as what they say. Nothing is ever executed.
    """
    for pattern, replacement in WRITTEN:
        expression = pattern.sub(replacement, expression)
    expression = " ".join(expression.split())
    if len(expression) > LONGEST or not re.fullmatch(r"[\d+\-*/() ]+", expression):
        return None
    # 007 is a number, though not to Python's parser
    expression = re.sub(r"\b0+(?=\d)", "", expression)
    try:
        numbers: list[int] = []
        value = _value(ast.parse(expression, mode="eval").body, numbers)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return Worth(value, tuple(numbers))


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            numbers.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, numbers)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, numbers)
        case ast.BinOp(left=left, op=op, right=right):
            one, other = _value(left, numbers), _value(right, numbers)
            match op:
                case ast.Add():
                    return one + other
                case ast.Sub():
                    return one - other
                case ast.Mult():
                    return one * other
                case ast.Div():
                    return one / other
    raise ValueError("not arithmetic")  # ** and // among others


def solves(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Return whether the expression uses each number once, no other, and gives the target."""
    found = worth(expression)
    return (
        found is not None
        and sorted(found.numbers) == sorted(numbers)
        and found.value == Fraction(target)
    )


def expression_of(completion: str, *, equation: bool = False, loose: bool = False) -> str | None:
    r"""Return the content of the last `<answer>`, its `\boxed` first, or the last `\boxed`.

    equation  of `a + b = c`, take `a + b`, if all sides are worth the same
    loose     where no answer is marked, the last line that is an expression (or equation)
    """
    inside = tagged(completion)
    found = boxed(completion if inside is None else inside)
    found = inside if found is None else found
    if found is None and loose:
        lines = [_left(line, equation) for line in completion.splitlines()]
        return next((line for line in reversed(lines) if worth(line) is not None), None)
    return None if found is None else _left(found, equation)


def _left(text: str, equation: bool) -> str:
    """Return the first side of an equation that holds; any other text as it is."""
    sides = text.split("=")
    worths = {None if (one := worth(side)) is None else one.value for side in sides}
    return sides[0] if equation and len(worths) == 1 and None not in worths else text


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

    wrong     of an answer in its tags (or box) that is not right
    equation  an answer may be written `a + b = c`, where both sides are looked at
    loose     an answer need not be marked, see `expression_of`

    A completion without an answer gets 0.

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
