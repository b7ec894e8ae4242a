"""What committing several tokens at once saves and costs: forward passes, accuracy, repetitions.

python -m eval.parallel --config configs/eval/parallel.yaml
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_pipelines import command_line
from data_pipelines.shards import write_file
from eval.metrics import estimate
from eval.passes import counted
from eval.provenance import describe_hardware, describe_model
from eval.questions import Questions
from mmdlm.generate import Model
from mmdlm.loading import load


@dataclass(frozen=True)
class Faster:
    """One way to decode; all None: one token a step."""

    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    in_order: bool | None = None

    @property
    def name(self) -> str:
        """For the table."""
        given = [
            name.replace("_", " ") + ("" if value is True else f" {value}")
            for name, value in asdict(self).items()
            if value is not None
        ]
        return ", ".join(given) or "one token a step"


@dataclass(frozen=True)
class Outcome:
    """What came of one way to decode a task.

    forwards  passes an answer
    right     share
    error     its standard error
    repeats   share of answers in which a word stands twice in a row
    """

    task: str
    decoding: str
    forwards: float
    right: float
    error: float
    repeats: float


def outcome(name: str, task: Questions, model: Model, faster: Faster) -> Outcome:
    """Ask all questions of a task."""
    asked, passes = counted(model.faster(**asdict(faster)))
    generator = torch.Generator().manual_seed(0)
    said, right = task.answers(asked, generator=generator)
    found = estimate(right)
    return Outcome(
        task=name,
        decoding=faster.name,
        forwards=passes.rows / len(said),
        right=found.value,
        error=found.standard_error,
        repeats=sum(map(has_repeats, said)) / len(said),
    )


def has_repeats(text: str) -> bool:
    """Whether a word stands twice in a row."""
    return bool(re.search(r"\b(\w+)\W+\1\b", text, re.IGNORECASE))


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown; each way to decode beside one token a step."""
    lines = [
        "| task | decoding | forwards an answer | right | repeats a word |",
        "|---|---|---|---|---|",
    ]
    usual: dict[str, Outcome] = {}
    for one in outcomes:
        base = usual.setdefault(one.task, one)
        forwards, right = f"{one.forwards:.2f}", f"{100 * one.right:.1f} % ± {100 * one.error:.1f}"
        if one is not base:
            forwards += f" ({base.forwards / one.forwards:.1f} x fewer)"
            right += f" ({100 * (one.right - base.right):+.1f})"
        repeats = f"{100 * one.repeats:.1f} %"
        lines.append(f"| {one.task} | {one.decoding} | {forwards} | {right} | {repeats} |")
    return "\n".join(lines)


def main(
    tasks: dict[str, Questions],
    faster: list[Faster],
    *,
    out: Path = Path("runs/eval/parallel.json"),
) -> None:
    """Decode tasks one token a step, then several at once, and print what that saves and costs.

    Args:
        tasks: By name.
        faster: Ways to decode, each beside one token a step.
        out: JSON file for the table.
    """
    if not tasks:
        raise ValueError("there are no tasks; name one at least")
    outcomes: list[Outcome] = []
    models: dict[str, Any] = {}
    with tqdm(total=len(tasks) * (1 + len(faster)), unit="run") as bar:
        for name, task in tasks.items():
            model = load(task.model, device="cpu")
            models[name] = describe_model(task.model, model)
            for way in (Faster(), *faster):
                outcomes.append(outcome(name, task, model, way))
                bar.update()
    report = {
        "outcomes": [asdict(one) for one in outcomes],
        "models": models,
        "hardware": describe_hardware(torch.device("cpu")),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    content = json.dumps(report, indent=2) + "\n"
    write_file(out, lambda file: file.write(content.encode()))
    print(table(outcomes))
    print(out)


if __name__ == "__main__":
    command_line.run(main)
