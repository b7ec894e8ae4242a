"""What a policy says while it learns, for people to read: a table, and a sheet of its images."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from mmdlm.atomic_files import atomic_write
from mmdlm.rl.reward import Breakdown
from train.stages.samples import sheet


class CompletionsTable:
    """Writes a round's completions every so many rounds, as .jsonl, .txt and, for images, .png.

    The rows have TRL's columns: step (the first that learns from them), prompt, completion, each
    reward, reward (their weighted sum), advantage, and what rewards noted.
    """

    def __init__(self, folder: Path, *, every: int, num_iterations: int) -> None:
        self.folder, self.every, self.num_iterations = folder, every, num_iterations

    def write(
        self,
        number: int,
        prompts: Sequence[str],
        completions: Sequence[Any],
        rewards: Breakdown,
        advantage: Tensor,
    ) -> None:
        """Write the files of a round, if it is its turn; those of a killed run are replaced."""
        if number % self.every:
            return
        step = number * self.num_iterations + 1
        beside = self.folder / f"completions_{step:08d}"
        drawn = [one for one in completions if isinstance(one, Image.Image)]
        rows = [
            {
                "step": step,
                "prompt": prompt,
                "completion": f"{beside.name}.png, {n}" if drawn else completion,
                **{name: _number(values[n]) for name, values in rewards.rewards.items()},
                "reward": _number(rewards.total[n]),
                "advantage": _number(advantage[n]),
                **{column: values[n] for column, values in rewards.extras.items()},
            }
            for n, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        _write(beside.with_suffix(".jsonl"), lines)
        _write(beside.with_suffix(".txt"), "\n".join(map(_readable, rows)))
        if drawn:
            notes = [f"{row['reward']} ({row['advantage']})" for row in rows]
            image = sheet(drawn, list(prompts), notes)
            atomic_write(beside.with_suffix(".png"), lambda file: image.save(file, format="PNG"))


def _number(value: Tensor) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(float(value)) else round(float(value), 6)


def _readable(row: dict[str, Any]) -> str:
    texts = ("prompt", "completion")
    rest = ", ".join(f"{name} {value}" for name, value in row.items() if name not in texts)
    return f"--- {rest}\n{row['prompt']}\n>>>\n{row['completion']}\n"


def _write(path: Path, text: str) -> None:
    atomic_write(path, lambda file: file.write(text.encode()))
