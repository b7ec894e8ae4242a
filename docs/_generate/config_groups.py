"""The groups of keys that recipes take: dataclasses by field, and the classes of each part."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from importlib import import_module
from typing import Any

import docstring_parser

from docs._generate.files_page import cell
from docs._generate.tree import CODE, modules

_CALL = re.compile(r"Callable\[.*\]")  # what a function is given is no key
_CLASS = re.compile(r"\b[A-Z]\w+")


def sections(hints: Iterable[str]) -> str:
    """Return the sections about every group that these type hints name, and those within them."""
    known, todo, done = _classes(), [_CALL.sub("", hint) for hint in hints], []
    while todo:
        for name in _CLASS.findall(todo.pop(0)):
            kind = known.get(name)
            if kind is None or kind in done:
                continue
            done.append(kind)
            if not inspect.isabstract(kind) and is_dataclass(kind):
                todo += [str(field.type) for field in fields(kind)]
    groups = [kind for kind in done if is_dataclass(kind) and not inspect.isabstract(kind)]
    parts = [kind for kind in done if inspect.isabstract(kind)]
    lines = ["## Groups of keys", ""]
    for kind in sorted(groups, key=lambda kind: kind.__name__):
        lines += [f"### `{kind.__name__}`", "", cell(_first(kind)), "", *_table(kind), ""]
    lines += [
        "## Parts that are named by class path",
        "",
        "`class_path` names the class, `init_args` holds its fields. A class without required "
        "fields may be named alone. A class of your own works the same way.",
        "",
    ]
    for kind in sorted(parts, key=lambda kind: kind.__name__):
        lines += [f"### `{kind.__name__}`", "", cell(_first(kind)), ""]
        lines += ["| class path | fields | |", "|---|---|---|"]
        lines += [_row(one) for one in _below(kind)]
        lines.append("")
    return "\n".join(lines)


def linked(hint: str) -> str:
    """Return a type hint as code, with a link where the page has a section about its class."""
    kind = _classes().get(hint.removesuffix(" | None"))
    has_section = kind is not None and (inspect.isabstract(kind) or is_dataclass(kind))
    return f"[`{hint}`](#{kind.__name__.lower()})" if has_section and kind else _code(hint)


@cache
def _classes() -> dict[str, type]:
    """The classes of our own modules, by name."""
    found = {}
    for name, _ in modules(*CODE):
        if any(part.startswith("_") for part in name.split(".")) or name not in sys.modules:
            continue
        for kind in vars(import_module(name)).values():
            if inspect.isclass(kind) and kind.__module__.split(".")[0] in CODE:
                found[kind.__name__] = kind
    return found


def _below(kind: type) -> list[type]:
    every = {*kind.__subclasses__()}
    for one in list(every):
        every |= {*_below(one)}
    concrete = [one for one in every if not inspect.isabstract(one)]
    ours = [one for one in concrete if one.__module__.split(".")[0] in CODE]
    public = [one for one in ours if not one.__name__.startswith("_")]
    return sorted(public, key=lambda one: (one.__module__, one.__name__))


def _first(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n\n")[0]


def _row(kind: type) -> str:
    names = ", ".join(f"`{field.name}`" for field in fields(kind)) if is_dataclass(kind) else ""
    return f"| `{kind.__module__}.{kind.__name__}` | {names} | {cell(_first(kind))} |"


def _table(kind: type) -> list[str]:
    meanings = told(kind)
    rows = [
        f"| `{field.name}` | {linked(_type(field))} | {_code(_default(field))} "
        f"| {cell(meanings.get(field.name, ''))} |"
        for field in fields(kind)
    ]
    return ["| key | type | default | |", "|---|---|---|---|", *rows]


def _type(field: Field[Any]) -> str:
    return field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        text = str(field.default)
    elif field.default_factory is not MISSING:
        text = str(field.default_factory())
    else:
        return "required"
    return text if len(text) < 60 else text[:57] + "..."


def told(kind: type) -> dict[str, str]:
    """Return what the docstring says of each field."""
    params = docstring_parser.parse(inspect.getdoc(kind) or "").params
    return {one.arg_name: one.description or "" for one in params}


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
