"""Benchmark: GSM8K, sums in words.

python -m eval.tasks.gsm8k --model CHECKPOINT --data test.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipelines.sources.row_files import Row
from data_pipelines.sources.word_problems import Style, gsm8k_problem, read_gsm8k
from eval.tasks.benchmark import Asked, Benchmark, run, some_examples
from mmdlm.cli import recipe as command_line
from mmdlm.rl.reward import Rubric
from mmdlm.rl.rewards.answers.same_number import SameNumber

MEASURES = {
    "right": "answer right: the number in the box, the tags, or last of all",
    "strict": "answer right where it belongs: in the box, the tags, or after ####",
}


def benchmark(
    rows: Sequence[Row], *, style: Style = "d1", examples: Sequence[Row] = ()
) -> Benchmark:
    """`examples` are shown before each question."""
    return Benchmark(
        name="gsm8k",
        problems=tuple(gsm8k_problem(one, style=style, examples=examples) for one in rows),
        rubric=Rubric({"right": SameNumber(last=True), "strict": SameNumber()}, on_error="raise"),
        measures=MEASURES,
        facts={
            "style": style,
            "shots": len(examples),
            "examples": [one.where for one in examples],
        },
    )


def main(
    model: str,
    data: Path,
    *,
    out: Path = Path("runs/eval/gsm8k.json"),
    style: Style = "d1",
    shots: int = 0,
    examples: Path | None = None,
    asked: Asked = Asked(),
) -> None:
    """Measure how often a model answers questions of GSM8K right.

    Prints a table, and writes the JSON of --out with every setting; beside it all answers (.jsonl).

    Args:
        model: Bundled name, or the folder of a checkpoint or a run.
        data: A jsonl with question and answer, which ends in "#### 72".
        out: JSON file for the result.
        style: How a question is asked: as d1 evaluates, as it trains, or as a base model of LLaDA
            is, by a text to go on with.
        shots: Examples before each question, drawn by the seed.
        examples: The file that they are drawn from, as --data; not the one that is asked.
        asked: How the model is asked.
    """

    def make() -> Benchmark:
        shown = some_examples(examples, shots, data=data, seed=asked.seed, read=read_gsm8k)
        return benchmark(read_gsm8k(data), style=style, examples=shown)

    run(make, model, asked=asked, out=out, data=data)


if __name__ == "__main__":
    command_line.run(main)
