"""Benchmark: MATH-500, mathematics in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipelines.sources.row_files import Row
from data_pipelines.sources.word_problems import Style, math500_problem, read_math500
from eval.tasks.benchmark import Benchmark
from eval.tasks.task import TaskOfFile
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


@dataclass(frozen=True, kw_only=True)
class Math500(TaskOfFile):
    r"""Measure how often a model answers problems of MATH right.

    Args:
        data: A jsonl with problem and answer, or a solution with a \boxed answer.
        style: How a problem is asked: as d1 evaluates, as it trains, or as a base model of LLaDA
            is, by a text to go on with.
    """

    task: str = "math500"
    style: Style = "d1"

    def _benchmark(self) -> Benchmark:
        return benchmark(
            read_math500(self.data), style=self.style, examples=self._shown(read_math500)
        )
