"""The parsers of the commands, as the commands themselves build them, without running anything."""

from __future__ import annotations

import argparse
import runpy
import tomllib
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NoReturn
from unittest import mock

import jsonargparse

from docs._generate.tree import ROOT, modules

_GUARD = 'if __name__ == "__main__":'


class _Built(BaseException):
    """A parser is ready; nothing that catches errors of a command may catch this."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def mmdlm_main() -> Callable[[list[str]], int]:
    """Return the function behind the command `mmdlm`, which pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, function = project["project"]["scripts"]["mmdlm"].partition(":")
    main: Callable[[list[str]], int] = getattr(import_module(module), function)
    return main


@cache
def mmdlm_parser() -> argparse.ArgumentParser:
    """Return the parser of the command `mmdlm`."""
    return _built(lambda: mmdlm_main()(["--version"]))


@cache
def parser_of(module: str) -> argparse.ArgumentParser:
    """Return the parser of a module that is run as `python -m MODULE`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it has been imported before it is run
        return _built(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


@cache
def task_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of `python -m eval.run --task NAME`."""
    kind = import_module("eval.run").named(name)
    return _built(lambda: import_module("mmdlm.cli.recipe").run(kind))


def commands_of(module: str) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of what a module does by name; none for one that does one thing."""
    if module == "eval.run":
        return {f"--task {name}": task_parser(name) for name in import_module(module).TASKS}
    return subcommands(parser_of(module))


def runnable(*roofs: str) -> list[str]:
    """Return the modules and packages below these folders that can be run, sorted."""
    return sorted(
        {
            name.removesuffix(".__main__")
            for name, path in modules(*roofs)
            if _GUARD in (ROOT / path).read_text(encoding="utf-8")
        }
    )


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the subcommands by name; none for a parser that has none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _built(call: Callable[[], Any]) -> argparse.ArgumentParser:
    def stop(self: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise _Built(self)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(jsonargparse.ArgumentParser, "parse_args", stop),
    ):
        try:
            call()
        except _Built as built:
            return built.parser
    raise AssertionError("the command ended without parsing its options")
