"""The pages of commands, jobs, recipes and benchmarks: every option, read off their parsers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs._generate.config_groups import linked, sections
from docs._generate.files_page import cell
from docs._generate.parsers import commands_of, mmdlm_parser, parser_of, runnable, subcommands
from docs._generate.tree import ROOT, summary

_HIDDEN = {"--help", "--config", "--print_config", "--print_shtab"}


def pages() -> dict[str, str]:
    """Return the pages by their place in docs/."""
    for module in runnable("train", "data_pipelines", "eval"):
        parser_of(module)  # first, so that the classes of all are known to each page
    return {
        "reference/cli.md": _mmdlm(),
        "reference/recipes.md": _page(
            "Recipes and their config keys",
            "A recipe of `train` reads a YAML file. Each key below is a key of that file, and an "
            "option `--key value` of the command line. An option given later wins. "
            "`--print_config` shows the result. An unknown key is an error. A key of a group, such "
            "as `--training.max_steps`, is listed under [groups of keys](#groups-of-keys).",
            "train",
        ),
        "reference/jobs.md": _page(
            "Data jobs",
            "Each job of `data_pipelines` writes shards or files for training. The options may "
            "stand in a YAML file: `--config FILE`.",
            "data_pipelines",
        ),
        "reference/evaluation.md": _page(
            "Benchmarks",
            "Each benchmark of `eval` writes its results to a file, with the settings and the "
            "hardware.",
            "eval",
        ),
    }


def _mmdlm() -> str:
    parser = mmdlm_parser()
    lines = [
        "# Command line",
        "",
        "The wheel installs the command `mmdlm`. From a checkout, `.venv/bin/mmdlm` is the same.",
        "",
    ]
    for name, command in subcommands(parser).items():
        usage = " ".join(command.format_usage().removeprefix("usage:").split())
        lines += [f"## `mmdlm {name}`", "", command.description or "", ""]
        lines += ["```text", *_folded(usage), "```", "", *_table(command), ""]
        if command.epilog:
            lines += [command.epilog, ""]
    return "\n".join(lines)


def _page(title: str, introduction: str, roof: str) -> str:
    lines = [f"# {title}", "", introduction, ""]
    for module in runnable(roof):
        parser = parser_of(module)
        path = Path(module.replace(".", "/"))
        path = path / "__main__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")
        lines += [f"## `python -m {module}`", "", summary(path), ""]
        commands = commands_of(module)
        for name, command in commands.items():
            lines += [f"### `python -m {module} {name}`", "", command.description or "", ""]
            lines += [*_table(command), ""]
        if not commands:
            lines += [*_table(parser), ""]
    hints = [
        str(getattr(action, "_typehint", getattr(action, "basetype", "")))
        for module in runnable(roof)
        for parser in (parser_of(module), *commands_of(module).values())
        for action in parser._actions
    ]
    return "\n".join([*lines, sections(hints)])


def _table(parser: argparse.ArgumentParser) -> list[str]:
    rows = [
        f"| {', '.join(f'`{name}`' for name in names)} | {linked(kind)} | {_code(default)} "
        f"| {cell(text)} |"
        for names, kind, default, text in _options(parser)
    ]
    return ["| option | type | default | |", "|---|---|---|---|", *rows] if rows else []


def _options(parser: argparse.ArgumentParser) -> Iterator[tuple[list[str], str, str, str]]:
    titles = {getattr(group, "dest", None): group.title for group in parser._action_groups}
    for action in parser._actions:
        names = [name for name in action.option_strings if not name.endswith("+")]
        if _HIDDEN & set(names) or isinstance(action, argparse._SubParsersAction):
            continue
        if any("." in name for name in names):  # of a group, which has a section
            continue
        if hasattr(action, "basetype"):
            yield names, action.basetype.__name__, "", f"{titles.get(action.dest) or ''}."
            continue
        text = "" if action.help in (None, argparse.SUPPRESS) else str(action.help)
        text = re.sub(r"\(default: %\(default\)s\)", "", text).replace("%%", "%")
        if "%(" in text:
            text = text % vars(action)
        yield names or [str(action.metavar or action.dest)], _kind(action), _default(action), text


def _kind(action: argparse.Action) -> str:
    hint = getattr(action, "_typehint", None)
    if hint is not None:
        text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])|typing\.", "", _name(hint))
        text = re.sub(r"Unvalidated<([^<>]*)>", r"\1", text)
        return re.sub(r"^Optional\[(.*?)(?: \| None)?\]$", r"\1 | None", text)
    if action.choices is not None:
        return " | ".join(map(str, action.choices))
    if action.metavar is not None and action.option_strings:
        return str(action.metavar)
    return _name(action.type) if isinstance(action.type, type) else ""


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)


def _default(action: argparse.Action) -> str:
    if action.required or (not action.option_strings and action.nargs is None):
        return "required"
    if action.default in (None, argparse.SUPPRESS, False) and action.nargs == 0:
        return ""
    text = "" if action.default in (None, argparse.SUPPRESS, "==SUPPRESS==") else action.default
    if getattr(text, "class_path", None) is not None:
        return str(text.class_path)
    return str(text) if len(str(text)) < 80 else f"{str(text)[:77]}..."


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _folded(text: str, width: int = 88) -> list[str]:
    lines, line = [], ""
    for part in re.findall(r"\[[^\]]*\]|\S+", text):
        if line and len(line) + len(part) + 1 > width:
            lines.append(line)
            line = "   "
        line = f"{line} {part}" if line else part
    return [*lines, line]
