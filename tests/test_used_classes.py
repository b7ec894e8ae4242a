"""Each class of core and rl serves a recipe, other code, or a reason that the docs state."""

from __future__ import annotations

import inspect
import re
from abc import ABC
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("mmdlm/core", "mmdlm/rl")
# loaded by their paths, into processes of their own
BY_PATH = "mmdlm/rl/rewards/code"


def classes(files: list[Path]) -> dict[type, Path]:
    """Return the public classes of the two rooms, each with the file that defines it."""
    found = {}
    for path in files:
        text = path.as_posix()
        if path.suffix != ".py" or not text.startswith(ROOMS):
            continue
        if text.startswith(BY_PATH) and path.name != "unit_tests.py":
            continue
        module = import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
        for name, value in vars(module).items():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and not name.startswith("_"):
                found[value] = path
    return found


def is_choice(kind: type, path: Path) -> bool:
    """Return whether a recipe may name the class: it fills an abstract one, or is a reward."""
    fills = any(ABC in base.__bases__ and base is not kind for base in kind.__mro__)
    is_reward = path.as_posix().startswith("mmdlm/rl/rewards") and "__call__" in vars(kind)
    return (fills and not inspect.isabstract(kind)) or is_reward


def stated(text: str) -> set[str]:
    """Return the classes in the first column of the table of exceptions."""
    table = text.partition("## Experimental parts")[2].partition("\n\nThe rest")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def is_named(name: str, text: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None


@pytest.mark.slow
def test_choices_are_in_a_recipe_or_have_a_reason(project_files: list[Path]) -> None:
    recipes = "".join(
        (ROOT / path).read_text() for path in project_files if path.match("configs/*/*.yaml")
    )
    choices = {
        kind.__name__ for kind, path in classes(project_files).items() if is_choice(kind, path)
    }
    assert len(choices) > 40
    reasons = stated((ROOT / "docs/explanation/design.md").read_text())
    assert reasons <= choices, f"no longer there: {sorted(reasons - choices)}"
    idle = {name for name in choices if not is_named(name, recipes)}
    assert idle <= reasons, (
        f"move to mmdlm.experimental {sorted(idle - reasons)}, name them in a recipe, or give a "
        "reason in docs/explanation/design.md"
    )


@pytest.mark.slow
def test_all_other_classes_are_used(project_files: list[Path]) -> None:
    mentions: Counter[str] = Counter()
    for path in project_files:
        if path.suffix == ".py" and path.parts[0] in ("mmdlm", "train", "eval", "data_pipelines"):
            mentions.update(re.findall(r"\w+", (ROOT / path).read_text()))
    parts = {k: path for k, path in classes(project_files).items() if not is_choice(k, path)}
    assert len(parts) > 40
    idle = {kind.__name__: path for kind, path in parts.items() if mentions[kind.__name__] < 2}
    assert not idle, f"nothing uses {idle}"


@pytest.mark.parametrize("name, expected", [("Threshold", True), ("Thresh", False)])
def test_a_name_is_found_as_a_whole(name: str, expected: bool) -> None:
    assert is_named(name, "class_path: mmdlm.core.sampling.unmasking.Threshold") is expected
