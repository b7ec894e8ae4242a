"""Every public method of the wheel is documented, by itself or by the method that it overrides."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest

# loaded by their paths, into a process of their own; and what needs a package that is no extra
NOT_IMPORTED = ("mmdlm.rl.rewards.code.", "mmdlm.harnesses.lmms_eval")


def undocumented(module: str) -> Iterator[str]:
    """Yield the names of public methods and properties for which `help` says nothing."""
    for kind in vars(import_module(module)).values():
        if not inspect.isclass(kind) or kind.__module__ != module or kind.__name__.startswith("_"):
            continue
        for name, member in vars(kind).items():
            is_field = name in vars(kind).get("__annotations__", {})
            is_method = isinstance(member, property | classmethod | staticmethod | FunctionType)
            if is_field or not is_method or name.startswith("_"):
                continue
            if not inspect.getdoc(getattr(kind, name)):
                yield f"{module}.{kind.__name__}.{name}"


def test_public_methods_have_docstrings(project_files: list[Path]) -> None:
    names = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in project_files
        if path.suffix == ".py" and path.parts[0] == "mmdlm" and path.name != "__main__.py"
    ]
    modules = [name for name in names if not name.startswith(NOT_IMPORTED)]
    assert len(modules) > 100
    missing = [one for module in modules for one in undocumented(module)]
    assert not missing, "\n".join(missing)


def test_a_missing_docstring_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmdlm.core.kv_cache as module

    bare = type("Bare", (), {"go": lambda self: None, "__module__": module.__name__})
    monkeypatch.setattr(module, "Bare", bare, raising=False)
    assert [*undocumented(module.__name__)] == [f"{module.__name__}.Bare.go"]
