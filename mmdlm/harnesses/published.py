"""Read the settings under which scores were published: presets of the harnesses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from mmdlm.vision.known_names import suggestion

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class PublishedTask:
    """How one task was asked, and what came out.

    Attributes:
        task: Names of the task in the harness; `*` stands for anything.
        kind: Whether the model writes an answer or scores given ones.
        shots: Examples before each question; None: as many as the task has.
        settings: Those of this task only.
        reported: Scores, in percent unless the words say otherwise, each with who reported it.
        note: What else has to be known.
        hardware: Where it mattered.
    """

    task: tuple[str, ...]
    kind: Literal["write", "score"]
    shots: int | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    reported: tuple[tuple[float, str], ...] = ()
    note: str = ""
    hardware: str = ""

    def is_named(self, task: str) -> bool:
        """Return whether a name of the harness is that of this task."""
        return any(fnmatchcase(task, pattern) for pattern in self.task)


@dataclass(frozen=True)
class Preset:
    """Settings under which somebody published scores of a model.

    Attributes:
        name: By which it is chosen.
        title: For people.
        family: Of the model.
        checkpoint: The weights that were asked.
        harness: Which harness has the tasks under these names.
        ran_with: The software of those who reported.
        source: Where all this stands.
        prompt: How the model was asked.
        end_rule: What was done about the end of a text.
        settings: Of all tasks.
        tasks: The tasks.
        chat: Whether prompts go through the chat template.
    """

    name: str
    title: str
    family: str
    checkpoint: str
    harness: Literal["lm_eval", "lmms_eval"]
    ran_with: str
    source: str
    prompt: str
    end_rule: str
    settings: Mapping[str, Any]
    tasks: tuple[PublishedTask, ...]
    chat: bool = False

    def settings_for(self, task: str | None) -> dict[str, Any]:
        """Return the settings of a task; those of all tasks where it is not in the list."""
        own = next((one.settings for one in self.tasks if task and one.is_named(task)), {})
        steps = {"num_inference_steps", "tokens_per_step"}  # two ways to say one thing
        shared = {k: v for k, v in self.settings.items() if not (k in steps and steps & {*own})}
        return {**shared, **own}


@cache
def presets() -> Mapping[str, Preset]:
    """Return all presets by name."""
    given = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {name: _preset(name, entry) for name, entry in given.items()}


def preset_named(name: str) -> Preset:
    """Find a preset.

    Args:
        name: Its name.

    Returns:
        The preset.

    Raises:
        ValueError: If there is none; the message lists them.
    """
    known = presets()
    if name not in known:
        raise ValueError(
            f"there is no preset {name!r}; known are {', '.join(known)}{suggestion(name, known)}"
        )
    return known[name]


def _preset(name: str, entry: Mapping[str, Any]) -> Preset:
    tasks = tuple(
        PublishedTask(
            **{
                **one,
                "task": tuple(one["task"]),
                "reported": tuple((score, who) for score, who in one["reported"]),
            }
        )
        for one in entry["tasks"]
    )
    return Preset(**{**entry, "name": name, "tasks": tasks})
