"""Benchmark: GSM8K, sums in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipelines.sources.row_files import Row
from data_pipelines.sources.word_problems import Style, gsm8k_problem, read_gsm8k
from eval.tasks.benchmark import Benchmark
from eval.tasks.task import TaskOfFile
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


@dataclass(frozen=True, kw_only=True)
class Gsm8k(TaskOfFile):
    """Measure how often a model answers questions of GSM8K right.

    Args:
        data: A jsonl with question and answer, which ends in "#### 72".
        style: How a question is asked: as d1 evaluates, as it trains, or as a base model of LLaDA
            is, by a text to go on with.
    """

    task: str = "gsm8k"
    style: Style = "d1"

    def _benchmark(self) -> Benchmark:
        return benchmark(read_gsm8k(self.data), style=self.style, examples=self._shown(read_gsm8k))
