"""Countdown: what an expression is worth, all that numbers make, new problems, and answers."""

from __future__ import annotations

import ast
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from typing import Literal

import torch

from mmdlm.tasks.answers import boxed, tagged

MOST_NUMBERS = 5  # that are searched: beyond, one search takes minutes
MANY = 10**6  # of the largest number, beyond which problems are not counted
HELD_OUT_SHARE = 10  # one problem in so many
LONGEST = 200  # characters of an expression that is looked at
WRITTEN = (
    (re.compile(r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile("\\\\(?:times|cdot)\\b|[\u00d7\u00b7\u22c5]"), "*"),
    (re.compile(r"\\div\b|÷"), "/"),
    (re.compile("[\u2212\u2013]"), "-"),
    (re.compile(r"\\(?:left|right)\b|\\[()\[\],;! ]|\$"), " "),
)

Split = Literal["train", "held_out"]


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

    Args:
        completion: What a model has written.
        equation: Of `a + b = c`, take `a + b`, if all sides are worth the same.
        loose: Where no answer is marked, the last line that is an expression (or equation).

    Returns:
        An expression, or None.
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


@dataclass(frozen=True)
class Countdown:
    """Numbers, each to be used once, and what they are to make; `solution` is one way, or ""."""

    numbers: tuple[int, ...]
    target: int
    solution: str = ""

    @property
    def held_out(self) -> bool:
        """It is for evaluation: sha256 of the sorted numbers and the target is divisible by 10."""
        key = f"{sorted(self.numbers)} {self.target}"
        return int(hashlib.sha256(key.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class _Made:
    """An expression, and how it binds: 0 a number, 1 * or /, 2 + or -."""

    text: str
    binding: int


def _joined(left: _Made, operation: str, right: _Made) -> _Made:
    binding = 2 if operation in "+-" else 1
    one = f"({left.text})" if left.binding > binding else left.text
    # a - (b + c) and a / (b * c) keep their parentheses
    tight = right.binding > binding or (right.binding == binding and operation in "-/")
    other = f"({right.text})" if tight else right.text
    return _Made(f"{one}{operation}{other}", binding)


@lru_cache(maxsize=1 << 14)
def _reach(numbers: tuple[int, ...], whole: bool) -> dict[Fraction, _Made]:
    """Return all values of the sorted numbers, each used once, and the shortest expression of each.

    Args:
        numbers: Sorted.
        whole: Every step is a whole number.
    """
    if len(numbers) == 1:
        return {Fraction(numbers[0]): _Made(str(numbers[0]), 0)}
    found: dict[Fraction, _Made] = {}

    def add(value: Fraction, made: _Made) -> None:
        if whole and value.denominator != 1:
            return
        known = found.get(value)
        if known is None or len(made.text) < len(known.text):
            found[value] = made

    places = range(len(numbers))
    for size in range(1, len(numbers) // 2 + 1):
        for chosen in combinations(places, size):
            rest = tuple(numbers[i] for i in places if i not in chosen)
            some = tuple(numbers[i] for i in chosen)
            for a, left in _reach(some, whole).items():
                for b, right in _reach(rest, whole).items():
                    add(a + b, _joined(left, "+", right))
                    add(a * b, _joined(left, "*", right))
                    add(a - b, _joined(left, "-", right))
                    add(b - a, _joined(right, "-", left))
                    if b:
                        add(a / b, _joined(left, "/", right))
                    if a:
                        add(b / a, _joined(right, "/", left))
    return found


def reachable(numbers: Sequence[int], *, whole: bool = False) -> dict[Fraction, str]:
    """Return every value that the numbers make, each used once, with + - * / and parentheses.

    Args:
        numbers: Whole numbers.
        whole: With only whole numbers at every step.

    Returns:
        An expression for each value.
    """
    if not 1 <= len(numbers) <= MOST_NUMBERS or min(numbers) < 0:
        raise ValueError(f"numbers {list(numbers)}: give 1 to {MOST_NUMBERS}, none below 0")
    return {value: made.text for value, made in _reach(tuple(sorted(numbers)), whole).items()}


def solve(numbers: Sequence[int], target: int) -> str | None:
    """Return an expression of the numbers, each used once, that gives the target, or None."""
    return reachable(numbers).get(Fraction(target))


def make_problems(
    count: int,
    *,
    split: Split,
    numbers: int = 3,
    largest: int = 100,
    targets: tuple[int, int] = (10, 100),
    generator: torch.Generator,
) -> list[Countdown]:
    """Make different problems, each with a solution by whole numbers at every step.

    Args:
        count: Number of problems.
        split: The part of all problems to draw from; parts do not overlap.
        numbers: How many of them, drawn at random from 1 .. largest.
        largest: The largest number.
        targets: Least and largest; drawn at random of those that the numbers make.
        generator: Random numbers.

    Returns:
        `count` problems, no two alike.

    Raises:
        ValueError: Where there are not as many.
    """
    if not 2 <= numbers <= MOST_NUMBERS or largest < 1 or count < 0:
        raise ValueError(
            f"{count} problems of {numbers} numbers up to {largest}: give 2 to {MOST_NUMBERS} "
            "numbers, none of them below 1"
        )
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r} is none of train, held_out")
    least, most = targets
    drawings = math.comb(min(largest, MANY) + numbers - 1, numbers)
    possible = drawings * max(0, most - least + 1)
    if count > possible and largest <= MANY:
        raise ValueError(
            f"count {count}: there are at most {possible:,} problems of {numbers} numbers up to "
            f"{largest} with targets {least} to {most}; ask for fewer, or allow more"
        )
    found: dict[tuple[tuple[int, ...], int], Countdown] = {}
    idle = 0
    while len(found) < count:
        idle += 1
        if idle > 1000 + 200 * count:
            raise ValueError(
                f"only {len(found)} different problems turned up; ask for fewer, or allow larger "
                "numbers and more targets"
            )
        drawn = tuple(torch.randint(1, largest + 1, (numbers,), generator=generator).tolist())
        made = {int(v): text for v, text in reachable(drawn, whole=True).items()}
        within = sorted(value for value in made if least <= value <= most)
        if not within:
            continue
        target = within[int(torch.randint(len(within), (), generator=generator))]
        problem = Countdown(drawn, target, made[target])
        key = tuple(sorted(drawn)), target
        if key not in found and problem.held_out == (split == "held_out"):
            found[key] = problem
    return list(found.values())
