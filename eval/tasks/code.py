"""Benchmark: functions that pass their tests, in the format of HumanEval or MBPP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipelines.sources.code_problems import Style, code_problem, is_human_eval, read_code
from data_pipelines.sources.row_files import Row
from eval.tasks.benchmark import Benchmark
from eval.tasks.task import TaskOfFile
from mmdlm.rl.reward import Rubric
from mmdlm.rl.rewards.code.sandbox import Sandbox
from mmdlm.rl.rewards.code.unit_tests import CodeTests

MEASURES = {"pass@1": "all tests passed, of one answer each"}


def benchmark(
    rows: Sequence[Row],
    *,
    name: str = "code",
    style: Style = "d1_train",
    examples: Sequence[Row] = (),
    sandbox: Sandbox = Sandbox(),
    workers: int = 2,
) -> Benchmark:
    """Return a benchmark that runs code in a sandbox, `workers` at a time, with its errors."""
    human_eval = sum(is_human_eval(one) for one in rows)
    rewards = {"pass@1": CodeTests(sandbox=sandbox, workers=workers)}
    return Benchmark(
        name=name,
        problems=tuple(code_problem(one, style=style, examples=examples) for one in rows),
        rubric=Rubric(rewards, on_error="raise"),
        measures=MEASURES,
        facts={
            "human_eval": human_eval,
            "mbpp": len(rows) - human_eval,
            "style": style,
            "shots": len(examples),
            "examples": [one.where for one in examples],
            "seconds": sandbox.seconds,
            "megabytes": sandbox.megabytes,
        },
    )


@dataclass(frozen=True, kw_only=True)
class CodeTask(TaskOfFile):
    """Measure how often the code that a model writes passes its tests.

    Args:
        style: How a function is asked for: as d1 trains, or as a base model of LLaDA is, by a text
            to go on with.
        sandbox: What the code may use.
        workers: Programs that run at a time.
    """

    style: Style = "d1_train"
    sandbox: Sandbox = Sandbox()
    workers: int = 2

    def _benchmark(self) -> Benchmark:
        rows = read_code(self.data)
        other = "mbpp" if self.task == "humaneval" else "humaneval"
        for row in rows:
            if is_human_eval(row) != (self.task == "humaneval"):
                raise ValueError(f"{row.where}: a problem of another task; give --task {other}")
        return benchmark(
            rows,
            name=self.task,
            style=self.style,
            examples=self._shown(read_code),
            sandbox=self.sandbox,
            workers=self.workers,
        )


@dataclass(frozen=True, kw_only=True)
class HumanEval(CodeTask):
    """Measure how often the functions that a model completes pass the tests of HumanEval.

    Args:
        data: A jsonl of HumanEval, with prompt, test and entry_point.
    """

    task: str = "humaneval"


@dataclass(frozen=True, kw_only=True)
class Mbpp(CodeTask):
    """Measure how often the functions that a model writes pass the tests of MBPP.

    Args:
        data: A jsonl of MBPP, with text and test_list.
    """

    task: str = "mbpp"
