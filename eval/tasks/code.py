"""Benchmark: functions that pass their tests, in the format of HumanEval or MBPP.

python -m eval.tasks.code --model CHECKPOINT --data HumanEval.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipelines.sources.code_problems import Style, code_problem, is_human_eval, read_code
from data_pipelines.sources.row_files import Row
from eval.tasks.benchmark import Asked, Benchmark, run, some_examples
from mmdlm.cli import recipe as command_line
from mmdlm.rl.reward import Rubric
from mmdlm.rl.rewards.code.sandbox import Sandbox
from mmdlm.rl.rewards.code.unit_tests import CodeTests

MEASURES = {"pass@1": "all tests passed, of one answer each"}


def benchmark(
    rows: Sequence[Row],
    *,
    style: Style = "d1_train",
    examples: Sequence[Row] = (),
    sandbox: Sandbox = Sandbox(),
    workers: int = 2,
) -> Benchmark:
    """The code is run in a sandbox, `workers` at a time; why one failed is written beside it."""
    human_eval = sum(is_human_eval(one) for one in rows)
    rewards = {"pass@1": CodeTests(sandbox=sandbox, workers=workers)}
    return Benchmark(
        name="code",
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


def main(
    model: str,
    data: Path,
    *,
    out: Path = Path("runs/eval/code.json"),
    style: Style = "d1_train",
    shots: int = 0,
    examples: Path | None = None,
    sandbox: Sandbox = Sandbox(),
    workers: int = 2,
    asked: Asked = Asked(),
) -> None:
    """Measure how often the code that a model writes passes its tests.

    Prints a table, and writes the JSON of --out with every setting; beside it all answers (.jsonl),
    and why it failed.

    Args:
        model: Bundled name, or the folder of a checkpoint or a run.
        data: A jsonl of HumanEval (prompt, test, entry_point) or MBPP (text, test_list).
        out: JSON file for the result.
        style: How a function is asked for: as d1 trains, or as a base model of LLaDA is, by a text
            to go on with.
        shots: Examples before each problem, drawn by the seed.
        examples: The file that they are drawn from, as --data; not the one that is asked.
        sandbox: What the code may use.
        workers: Programs that run at a time.
        asked: How the model is asked.
    """

    def make() -> Benchmark:
        shown = some_examples(examples, shots, data=data, seed=asked.seed, read=read_code)
        rows = read_code(data)
        return benchmark(rows, style=style, examples=shown, sandbox=sandbox, workers=workers)

    run(make, model, asked=asked, out=out, data=data)


if __name__ == "__main__":
    command_line.run(main)
