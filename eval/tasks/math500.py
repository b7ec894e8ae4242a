"""Benchmark: MATH-500, mathematics in words.

python -m eval.tasks.math500 --model CHECKPOINT --data test.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipelines.sources.row_files import Row
from data_pipelines.sources.word_problems import Style, math500_problem, read_math500
from eval.tasks.benchmark import Asked, Benchmark, run, some_examples
from mmdlm.cli import recipe as command_line
from mmdlm.rl.reward import Rubric
from mmdlm.rl.rewards.answers.exact_match import ExactMatch
from mmdlm.rl.rewards.answers.math_equivalence import MathEquivalence

MEASURES = {
    "right": "answer right, however it is written",
    "exact": "answer right to the letter",
}


def benchmark(
    rows: Sequence[Row], *, style: Style = "d1", examples: Sequence[Row] = ()
) -> Benchmark:
    """`examples` are shown before each problem."""
    return Benchmark(
        name="math500",
        problems=tuple(math500_problem(one, style=style, examples=examples) for one in rows),
        rubric=Rubric({"right": MathEquivalence(), "exact": ExactMatch()}, on_error="raise"),
        measures=MEASURES,
        facts={
            "style": style,
            "shots": len(examples),
            "examples": [one.where for one in examples],
        },
        groups="level",
    )


def main(
    model: str,
    data: Path,
    *,
    out: Path = Path("runs/eval/math500.json"),
    style: Style = "d1",
    shots: int = 0,
    examples: Path | None = None,
    asked: Asked = Asked(),
) -> None:
    r"""Measure how often a model answers problems of MATH right.

    Prints a table, and writes the JSON of --out with every setting; beside it all answers (.jsonl).

    Args:
        model: Bundled name, or the folder of a checkpoint or a run.
        data: A jsonl with problem and answer, or a solution with a \boxed answer.
        out: JSON file for the result.
        style: How a problem is asked: as d1 evaluates, as it trains, or as a base model of LLaDA
            is, by a text to go on with.
        shots: Examples before each problem, drawn by the seed.
        examples: The file that they are drawn from, as --data; not the one that is asked.
        asked: How the model is asked.
    """

    def make() -> Benchmark:
        shown = some_examples(examples, shots, data=data, seed=asked.seed, read=read_math500)
        return benchmark(read_math500(data), style=style, examples=shown)

    run(make, model, asked=asked, out=out, data=data)


if __name__ == "__main__":
    command_line.run(main)
