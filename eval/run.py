"""Measure how many problems of a task a model solves: `python -m eval.run --task gsm8k --model X`.

`--task NAME --help` shows the options of a task.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import yaml

from eval.tasks.code import HumanEval, Mbpp
from eval.tasks.countdown import CountdownTask
from eval.tasks.gsm8k import Gsm8k
from eval.tasks.math500 import Math500
from eval.tasks.sudoku import SudokuTask
from eval.tasks.task import Task
from mmdlm.cli.recipe import run

TASKS: Mapping[str, type[Task]] = MappingProxyType(
    {
        "gsm8k": Gsm8k,
        "math500": Math500,
        "sudoku": SudokuTask,
        "countdown": CountdownTask,
        "humaneval": HumanEval,
        "mbpp": Mbpp,
    }
)


def main() -> None:
    """Run the task that the command line, or else a file of options, names."""
    parser = argparse.ArgumentParser(
        "eval.run",
        description="Measure how many problems of a task a model solves. `--task NAME --help` "
        "shows the options of a task.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--task", help=", ".join(TASKS))
    parser.add_argument(
        "--config", action="append", default=[], help="file of options; more than one may be given"
    )
    parser.add_argument(
        "--help", "-h", action="store_true", help="show this, or the task's options"
    )
    given, _ = parser.parse_known_args()
    try:
        name = given.task or task_of(given.config)
        if name is None and given.help:
            parser.print_help()
            return
        kind = named(name)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run(kind)


def task_of(configs: Sequence[str]) -> str | None:
    """Return the task that the last of some files of options names; None where none does."""
    for path in reversed(configs):
        try:
            options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
        if isinstance(options, dict) and options.get("task") is not None:
            return str(options["task"])
    return None


def named(name: str | None) -> type[Task]:
    """Return the task of a name.

    Args:
        name: Name of a task; None: none was given.

    Returns:
        The class of the task.

    Raises:
        ValueError: There is none; the message names the nearest.
    """
    if name is None:
        raise ValueError(f"no task is named; give --task, one of {', '.join(TASKS)}")
    if name not in TASKS:
        near = difflib.get_close_matches(name.lower(), TASKS, n=1, cutoff=0.5)
        nearest = f"the nearest is {near[0]}" if near else f"take one of {', '.join(TASKS)}"
        raise ValueError(f"there is no task {name!r}; {nearest}")
    return TASKS[name]


if __name__ == "__main__":
    main()
