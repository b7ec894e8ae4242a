"""Job: files of Countdown problems that can be solved, and how a problem is asked.

python -m data_pipelines.countdown --out problems.jsonl --numbers 3 --count 10000
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.sources.problems import D1_BEGUN, D1_FORM, Problem, Prompt
from data_pipelines.sources.row_files import Row, read_rows
from mmdlm.atomic_files import atomic_write
from mmdlm.cli import recipe as command_line
from mmdlm.tasks.countdown import Countdown, Split, make_problems

Style = Literal["d1", "d1_train", "plain"]

D1_COUNTDOWN = (
    "Using only the provided numbers, create an arithmetic expression that evaluates to exactly "
    "the provided target number. You may use the operations +, -, *, and / as needed, but each "
    "number must be used exactly once. Think step-by-step. After reasoning, provide only your "
    "final expression inside \\boxed{} tags without including an equals sign or the target "
    "number. For example: \\boxed{a + b * c}Respond in the following format:\n<reasoning>\nYour "
    "reasoning here\n</reasoning>\n<answer>\n\\boxed{...}\n</answer>"
)


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
    """In the published format, and `solution` beside it: one way, to be learned from."""
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
    atomic_write(out, lambda file: file.write(to_jsonl(problems)))
    print(f"{out}: {len(problems)} problems, {split}")


if __name__ == "__main__":
    command_line.run(main)
