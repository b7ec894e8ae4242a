"""Countdown problems that can be solved, and files of them.

python -m data_pipelines.countdown --out problems.jsonl --numbers 3 --count 10000
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch

from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.shards.shards import write_file
from data_pipelines.sources.problems import D1_BEGUN, D1_FORM, Problem, Prompt
from data_pipelines.sources.row_files import Row, read_rows
from mmdlm.cli import recipe as command_line

MANY = 10**6  # of the largest number, beyond which problems are not counted
MOST_NUMBERS = 5  # that are searched: beyond, one search takes minutes
HELD_OUT_SHARE = 10  # one problem in so many

Split = Literal["train", "held_out"]
Style = Literal["d1", "d1_train", "plain"]

D1_COUNTDOWN = (
    "Using only the provided numbers, create an arithmetic expression that evaluates to exactly "
    "the provided target number. You may use the operations +, -, *, and / as needed, but each "
    "number must be used exactly once. Think step-by-step. After reasoning, provide only your "
    "final expression inside \\boxed{} tags without including an equals sign or the target "
    "number. For example: \\boxed{a + b * c}Respond in the following format:\n<reasoning>\nYour "
    "reasoning here\n</reasoning>\n<answer>\n\\boxed{...}\n</answer>"
)


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
    """All values that the sorted numbers make, each used once -> the shortest expression.

    whole  every step is a whole number
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
    """Every value that the numbers make with + - * / and parentheses, each number used once.

    whole  with whole numbers at every step alone
    """
    if not 1 <= len(numbers) <= MOST_NUMBERS or min(numbers) < 0:
        raise ValueError(f"numbers {list(numbers)}: give 1 to {MOST_NUMBERS}, none below 0")
    return {value: made.text for value, made in _reach(tuple(sorted(numbers)), whole).items()}


def solve(numbers: Sequence[int], target: int) -> str | None:
    """An expression of the numbers, each used once, that is worth the target; None: none is."""
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
    """Different problems, all of which can be solved with whole numbers at every step.

    numbers  how many of them, drawn at random from 1 .. largest
    targets  least and largest; drawn at random of those that the numbers make

    Raises ValueError where there are not as many.
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


def read_countdown(path: Path) -> list[Countdown]:
    """Problems of a jsonl with `input` "30,100,93" and `output` "23".

    A line may end in the target, as Dream's do: `input` "3,4,5,23", `output` the way to get there.
    Also read are `numbers` (or `nums`) and `target`, as the training data of d1 has them.
    """
    return [_countdown(row) for row in read_rows(path)]


def _countdown(row: Row) -> Countdown:
    try:
        numbers = row.get("numbers", "nums")
        if numbers is not None:
            return Countdown(tuple(int(n) for n in numbers), int(row["target"]))
        numbers = tuple(int(n) for n in str(row["input"]).split(","))
        output = str(row["output"]).strip()
        if "=" in output:
            return Countdown(numbers[:-1], numbers[-1])
        return Countdown(numbers, int(output))
    except (TypeError, ValueError) as error:
        if row.where in str(error):
            raise
        raise ValueError(
            f'{row.where} is no Countdown problem; write input "30,100,93" and output "23"'
        ) from error


def to_jsonl(problems: Sequence[Countdown]) -> bytes:
    """In the published format, and `solution` beside it: one way, to be learnt from."""
    lines = [
        json.dumps(
            {
                "input": ",".join(map(str, one.numbers)),
                "output": str(one.target),
                "solution": one.solution,
            }
        )
        for one in problems
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def to_problem(one: Countdown, *, style: Style = "d1") -> Problem:
    """How it is asked: as d1 evaluates, as it trains, or shortly, for a small model."""
    numbers = list(one.numbers)
    if style == "plain":
        text = f"{','.join(map(str, numbers))}->{one.target}\n"
        prompt = Prompt(text, chat=False)
    elif style == "d1_train":
        prompt = Prompt(
            f"{D1_FORM}\nUsing only the numbers {numbers}, create an arithmetic expression that "
            f"evaluates to exactly {one.target}. You must use all numbers from the list, and each "
            "number must be used exactly once. You may use the operations +, -, *, and / as "
            "needed. After reasoning, provide only your final expression inside <answer></answer> "
            "tags without including an equals sign or the target number. For example, if the "
            "numbers are [2, 3, 4] and the target is 5, a valid answer is: <answer>\n2*4-3\n"
            "</answer>"
        )
    else:
        question = f"Numbers: {numbers}\nTarget: {one.target}"
        prompt = Prompt(f"{D1_COUNTDOWN}\n\n{question}", begun=D1_BEGUN)
    name = f"{','.join(map(str, numbers))}={one.target}"
    return Problem(name, prompt, {"numbers": numbers, "target": one.target})


@partial(sole_writer, is_file=True)
def main(
    out: Path,
    *,
    split: Split = "train",
    count: int = 1000,
    numbers: int = 3,
    largest: int = 100,
    targets: tuple[int, int] = (10, 100),
    seed: int = 0,
) -> None:
    """Write Countdown problems that can be solved, as jsonl.

    Args:
        out: The jsonl file.
        split: Nine problems of ten are for training, by sha256.
        count: Number of problems, all different.
        numbers: In each problem.
        largest: Of them.
        targets: Least and largest.
        seed: Of everything that is drawn at random.
    """
    generator = torch.Generator().manual_seed(seed)
    problems = make_problems(
        count,
        split=split,
        numbers=numbers,
        largest=largest,
        targets=targets,
        generator=generator,
    )
    write_file(out, lambda file: file.write(to_jsonl(problems)))
    print(f"{out}: {len(problems)} problems, {split}")


if __name__ == "__main__":
    command_line.run(main)
