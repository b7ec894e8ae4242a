"""What decoding faster saves and costs: passes, computed tokens, accuracy, repetitions.

python -m eval.faster --config configs/eval/faster.yaml
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

from eval.emoji.questions import Questions
from eval.metrics import estimate
from eval.provenance import describe_hardware, describe_model
from eval.speed.forward_passes import counted
from eval.tasks.benchmark import Faster
from mmdlm import load
from mmdlm.atomic_files import atomic_write
from mmdlm.cli import recipe as command_line
from mmdlm.pipeline.model import Model


@dataclass(frozen=True)
class Comparison:
    """Questions, and the ways to decode their answers that are tried."""

    questions: Questions
    faster: tuple[Faster, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of one way to decode a task.

    Attributes:
        forwards: Passes an answer.
        tokens: That were computed in these, in thousands an answer.
        right: Share.
        error: Its standard error.
        repeats: Share of answers in which a word stands twice in a row; None: they are no texts.
    """

    task: str
    generation_config: str
    forwards: float
    tokens: float
    right: float
    error: float
    repeats: float | None


def outcome(name: str, task: Questions, model: Model, faster: Faster) -> Outcome:
    """Ask all questions of a task."""
    asked, passes = counted(faster.applied_to(model))
    generator = torch.Generator().manual_seed(0)
    said, right = task.answers(asked, generator=generator)
    found = estimate(right)
    return Outcome(
        task=name,
        generation_config=faster.name,
        forwards=passes.rows / len(right),
        tokens=passes.tokens / len(right) / 1000,
        right=found.value,
        error=found.standard_error,
        repeats=None if said is None else sum(map(has_repeats, said)) / len(said),
    )


def has_repeats(text: str) -> bool:
    """Whether a word stands twice in a row."""
    return bool(re.search(r"\b(\w+)\W+\1\b", text, re.IGNORECASE))


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown; each way to decode beside the usual one."""
    lines = [
        "| task | decoding | forwards an answer | 1,000 tokens computed | right | repeats a word |",
        "|---|---|---|---|---|---|",
    ]
    usual: dict[str, Outcome] = {}
    for one in outcomes:
        base = usual.setdefault(one.task, one)
        forwards, tokens = f"{one.forwards:.2f}", f"{one.tokens:.2f}"
        right = f"{100 * one.right:.1f} % ± {100 * one.error:.1f}"
        if one is not base:
            forwards += f" ({base.forwards / one.forwards:.1f} x fewer)"
            tokens += f" ({base.tokens / one.tokens:.1f} x fewer)"
            right += f" ({100 * (one.right - base.right):+.1f})"
        repeats = "" if one.repeats is None else f"{100 * one.repeats:.1f} %"
        cells = (one.task, one.generation_config, forwards, tokens, right, repeats)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(tasks: dict[str, Comparison], *, out: Path = Path("runs/eval/faster.json")) -> None:
    """Decode tasks as usual, then faster, and print what that saves and costs.

    Args:
        tasks: By name: what is asked, and the faster ways to answer it.
        out: JSON file for the table.
    """
    if not tasks:
        raise ValueError("there are no tasks; name one at least")
    outcomes: list[Outcome] = []
    models: dict[str, Any] = {}
    with tqdm(total=sum(1 + len(task.faster) for task in tasks.values()), unit="run") as bar:
        for name, task in tasks.items():
            model = load(task.questions.model, device="cpu")
            models[name] = describe_model(task.questions.model, model)
            for way in (Faster(), *task.faster):
                outcomes.append(outcome(name, task.questions, model, way))
                bar.update()
    report = {
        "outcomes": [asdict(one) for one in outcomes],
        "models": models,
        "hardware": describe_hardware(torch.device("cpu")),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    content = json.dumps(report, indent=2) + "\n"
    atomic_write(out, lambda file: file.write(content.encode()))
    print(table(outcomes))
    print(out)


if __name__ == "__main__":
    command_line.run(main)
