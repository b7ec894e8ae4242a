"""What all tasks share: their options, and the run from a model to a report."""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data_pipelines.sources.problems import drawn
from data_pipelines.sources.row_files import Row
from eval.provenance import describe_hardware, describe_model, sha256_of
from eval.speed.forward_passes import counted
from eval.tasks.benchmark import Asked, Asking, Benchmark, Scored, ask, rate, summarize
from mmdlm import load
from mmdlm.atomic_files import atomic_write
from mmdlm.rl.reward import Breakdown

FOLDER = Path("runs/eval")  # of reports, by default


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Ask a model the problems of a task, and report how many it solves.

    Prints a table, and writes the JSON of --out with every setting; beside it all answers (.jsonl).

    Args:
        task: Name of the task.
        model: Bundled name, or the folder of a checkpoint or a run.
        data: File of the problems.
        out: JSON file for the result; default: runs/eval/TASK.json.
        asked: How the model is asked.
    """

    task: str
    model: str
    data: Path | None
    out: Path | None = None
    asked: Asked = Asked()

    @abstractmethod
    def _benchmark(self) -> Benchmark:
        """Return all problems, and what is measured of the answers."""

    def __call__(self) -> dict[str, Any]:
        """Run the task, and return its report."""
        out = self.out or FOLDER / f"{self.task}.json"
        return run(self._benchmark, self.model, asked=self.asked, out=out, data=self.data)


@dataclass(frozen=True, kw_only=True)
class TaskOfFile(Task):
    """A task whose problems come from a file, after worked examples from another.

    Args:
        data: File of the problems.
        shots: Examples before each problem, drawn by the seed.
        examples: The file that they are drawn from, as --data; not the one that is asked.
    """

    data: Path
    shots: int = 0
    examples: Path | None = None

    def _shown(self, read: Callable[[Path], list[Row]]) -> list[Row]:
        """Return the examples that stand before each problem."""
        return some_examples(
            self.examples, self.shots, data=self.data, seed=self.asked.seed, read=read
        )


def some_examples(
    examples: Path | None,
    shots: int,
    *,
    data: Path,
    seed: int,
    read: Callable[[Path], list[Row]],
) -> list[Row]:
    """Return the examples before each question, drawn by the seed; none for 0 shots.

    Raises ValueError where there is no file to draw from, or it is the one that is asked.
    """
    if shots < 0:
        raise ValueError(f"shots {shots} is below 0")
    if not shots:
        return []
    if examples is None:
        raise ValueError(f"{shots} shots need a file to draw examples from; give --examples")
    if examples.resolve() == data.resolve():
        raise ValueError(f"--examples {examples} is the file that is asked; give another")
    return drawn(read(examples), shots, generator=torch.Generator().manual_seed(seed))


def run(
    make: Callable[[], Benchmark], model: str, *, asked: Asked, out: Path, data: Path | None
) -> dict[str, Any]:
    """Load a model, ask it, score it, print the table, and write the report and every answer.

    Args:
        make: Returns the benchmark with all its problems; `asked` says how many are asked.
        model: Name or folder of the model.
        asked: What the command line asks for.
        out: JSON file of the report; every answer goes into a file beside it.
        data: The file that it was read from; None: it was made here.

    Returns:
        The report.
    """
    answers = _check_out(out)
    whole = make()  # a file that cannot be read is found before a model is loaded
    benchmark = replace(whole, problems=asked.of(whole.problems))
    benchmark.rubric.prepare()
    loaded = load(model, device=asked.device)
    described = describe_model(model, loaded)
    loaded, passes = counted(asked.applied_to(loaded))
    asking = Asking(loaded, asked, torch.Generator().manual_seed(asked.seed))
    asking.check(benchmark.problems)  # one that is too long is found before hours of others
    hardware, began = describe_hardware(loaded.device), time.perf_counter()
    completions = ask(benchmark.problems, asking, batch_size=asked.batch_size, title=benchmark.name)
    seconds = time.perf_counter() - began
    unscored = Scored(benchmark.problems, completions, Breakdown(torch.zeros(0), {}, {}))
    _write_answers(answers, unscored)  # hours of answers are not lost to a reward that fails
    scored = rate(benchmark, completions)
    kinds = {one.prompt.chat for one in benchmark.problems}
    report = {
        "benchmark": benchmark.name,
        "results": summarize(benchmark, scored),
        "settings": {
            **asdict(asked),
            "max_new_tokens": asking.length,
            "generation_config": {
                "answer" if chat else "complete": asdict(asking.generation_config(chat=chat))
                for chat in sorted(kinds)
            },
        },
        "data": {
            "file": None if data is None else data.name,
            "sha256": None if data is None else sha256_of(data),
            "problems": len(whole.problems),
            **benchmark.facts,
        },
        "model": described,
        "hardware": hardware,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds_of_answers": round(seconds, 1),
        "forwards_per_answer": round(passes.rows / max(1, len(completions)), 2),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(table(benchmark, report))
    atomic_write(out, lambda file: file.write((json.dumps(report, indent=2) + "\n").encode()))
    _write_answers(answers, scored)
    print("", out, answers, sep="\n")
    return report


def table(benchmark: Benchmark, report: Mapping[str, Any]) -> str:
    """Return the measured numbers as text."""
    results = report["results"]
    lines = [f"{benchmark.name}, {results['count']} problems, {report['model']['name']}"]
    for name, one in results["measures"].items():
        error = one["standard_error"]
        spread = "" if error is None else f" +- {100 * error:.1f}"
        says = benchmark.measures.get(name, name)
        lines.append(f"  {100 * one['value']:5.1f} %{spread:8}  {says} ({one['count']})")
    lines += [f"  {key.replace('_', ' ')}: {value}" for key, value in benchmark.facts.items()]
    return "\n".join(lines)


def _write_answers(path: Path, scored: Scored) -> None:
    atomic_write(path, lambda file: file.write("".join(_lines(scored)).encode()))


def _lines(scored: Scored) -> list[str]:
    """Every problem with its answer and its scores, one a line."""
    lines = []
    for n, (problem, said) in enumerate(zip(scored.problems, scored.completions, strict=True)):
        scores = {name: float(one[n]) for name, one in scored.breakdown.rewards.items()}
        extras = {name: values[n] for name, values in scored.breakdown.extras.items()}
        line = {
            "problem": problem.name,
            "prompt": problem.prompt.text,
            "begun": problem.prompt.begun,
            "completion": said,
            "columns": dict(problem.columns),
            "scores": {k: None if math.isnan(v) else v for k, v in scores.items()},
            **extras,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines


def _check_out(out: Path) -> Path:
    """Return the path of the file of answers; ValueError, before the slow work, for a bad one."""
    if out.suffix != ".json":
        raise ValueError(f"--out {out} does not end in .json; try {out.with_suffix('.json')}")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: its folder cannot be made ({error.strerror})") from error
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {out.parent} may not be written to; name another place")
    return out.with_suffix(".jsonl")
