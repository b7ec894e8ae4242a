"""What a run was told, kept with its checkpoints: it goes on with the same, or says what is not."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

FILE = "settings.json"
CLASS = "class"
# What has no part in what is learned, and may be another without a word.
FREE = (
    *(
        "out",
        "threads",
        "examples",
        "log_completions_every",
        "log_entropy",
        "*max_broken",
        "on_sample*",
    ),
    *(f"training.{name}*" for name in ("save_steps", "save_total_limit", "sample_steps")),
    *(f"training.{name}*" for name in ("logging_steps", "trackers", "not_finite")),
)
# What may be another while a run goes on, if that is said; the second row is where things are.
SAID = (
    *(f"training.{name}*" for name in ("max_steps", "max_grad_norm", "optimizer.", "schedule")),
    *("training.mixed_precision", "training.compile", "budget*"),
    *("*urls*", "*path", "model.start_from", "model.text_tokenizer", "model.image_tokenizer"),
    *("model.vision_tower_weights", "model.attention", "model.recompute", "model.save_dtype"),
    "generation_config*",
)
DEEP = 30  # levels of values in values, of which deeper ones are left out


@dataclass(frozen=True)
class Record:
    """All settings of a run, as JSON can hold them."""

    settings: Mapping[str, Any]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Record:
        """Of values as recipes take them: numbers, texts, paths, dataclasses, functions."""
        return cls({name: _plain(value) for name, value in settings.items()})

    def write(self, folder: Path) -> None:
        """Keep it with a checkpoint."""
        text = json.dumps(self.settings, indent=1, sort_keys=True)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    def check(self, folder: Path, *, finished: bool) -> list[str]:
        """Return sentences about settings that differ from those of the checkpoint.

        Args:
            folder: The checkpoint.
            finished: Whether nothing is left to be done, so that other settings would be a claim.

        Returns:
            One sentence for each setting that may differ.

        Raises:
            ValueError: For what a run cannot go on with.
        """
        try:
            before = json.loads((folder / FILE).read_text(encoding="utf-8"))
            differing = _differences(before, json.loads(json.dumps(self.settings)))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{folder / FILE} cannot be read ({error})") from error
        known = {name: said for name, said in differing.items() if not _is_one_of(name, FREE)}
        if finished and known:
            raise ValueError(
                f"the run of {folder.parent} is finished, with other settings: "
                f"{'; '.join(known.values())}; set them back, or train into another folder"
            )
        wrong = [said for name, said in known.items() if not _may_change(name)]
        if wrong:
            raise ValueError(
                f"{folder} was written with other settings: {'; '.join(wrong)}; set them back, or "
                "train into another folder"
            )
        return list(known.values())


def _may_change(name: str) -> bool:
    return _is_one_of(name, SAID) and name != f"training.optimizer.{CLASS}"


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _differences(before: Any, now: Any, name: str = "") -> dict[str, str]:
    """By name what was another. A field that only one version of a class knows is passed over."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = before.keys() | now.keys()
        if not name or (CLASS in now and before.get(CLASS) == now[CLASS]):
            names = before.keys() & now.keys()
        found: dict[str, str] = {}
        for key in sorted(names):
            inner = f"{name}.{key}" if name else key
            found |= _differences(before.get(key, "absent"), now.get(key, "absent"), inner)
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        found = {}
        for number, pair in enumerate(zip(before, now, strict=True)):
            found |= _differences(*pair, f"{name}.{number}")
        return found
    if before == now or (before != before and now != now):  # NaN is itself here
        return {}
    return {name: f"{name} was {_short(before)} and is {_short(now)}"}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 80 else f"{text[:77]}..."


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a value as JSON; an object of no known kind by its class name and its fields."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if depth > DEEP:
        return _name_of(type(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(one, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, depth + 1) for one in value]
    if isinstance(value, functools.partial):
        name, inner = _name_of(value.func), {"args": value.args, **value.keywords}
    elif is_dataclass(value) and not isinstance(value, type):
        name = _name_of(type(value))
        inner = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, type) or hasattr(value, "__qualname__"):
        return _name_of(value)
    else:
        name, inner = _name_of(type(value)), getattr(value, "__dict__", {})
    return {CLASS: name, **{str(key): _plain(one, depth + 1) for key, one in inner.items()}}


def _name_of(value: Any) -> str:
    return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', '?')}"
