"""The import rules of the house, read from the source: which room may know which."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# room -> the rooms of ours that it may import; "mmdlm" is __init__, which opens the pipeline
MAY_IMPORT = {
    "mmdlm.atomic_files": set(),
    "mmdlm.core": {"mmdlm.core"},
    # the one Transformer holds the vision adapter whose features stand in its rows
    "mmdlm.models": {"mmdlm.atomic_files", "mmdlm.core", "mmdlm.models", "mmdlm.vision"},
    "mmdlm.vision": {"mmdlm.atomic_files", "mmdlm.core", "mmdlm.vision"},
    "mmdlm.templates": {"mmdlm.core", "mmdlm.templates"},
    "mmdlm.tasks": {"mmdlm.tasks"},
    "mmdlm.rl": {"mmdlm.core", "mmdlm.rl", "mmdlm.tasks"},
}
MAY_IMPORT["mmdlm.pipeline"] = {*MAY_IMPORT, "mmdlm.pipeline"} - {"mmdlm.rl", "mmdlm.tasks"}
MAY_IMPORT["mmdlm.serving"] = {*MAY_IMPORT, "mmdlm.serving"} - {"mmdlm.rl", "mmdlm.tasks"}
MAY_IMPORT["mmdlm.cli"] = {*MAY_IMPORT, "mmdlm.cli", "mmdlm"} - {"mmdlm.rl", "mmdlm.tasks"}
MAY_IMPORT["mmdlm.harnesses"] = MAY_IMPORT["mmdlm.pipeline"] | {"mmdlm.harnesses"}
MAY_IMPORT["mmdlm.integrations"] = MAY_IMPORT["mmdlm.pipeline"] | {"mmdlm.integrations"}
MAY_IMPORT["mmdlm"] = {"mmdlm", "mmdlm.pipeline", "mmdlm.templates", "mmdlm.vision"}
WHEEL = set(MAY_IMPORT)
# what no recipe uses: nothing else of ours may rest on it
MAY_IMPORT["mmdlm.experimental"] = {"mmdlm.core", "mmdlm.rl", "mmdlm.experimental"}
IN_WHEEL = WHEEL | {"mmdlm.experimental"}
MAY_IMPORT["data_pipelines"] = WHEEL | {"data_pipelines"}
MAY_IMPORT["train"] = WHEEL | {"data_pipelines", "train"}
MAY_IMPORT["eval"] = WHEEL | {"data_pipelines", "eval"}
MAY_IMPORT["docs"] = WHEEL | {"data_pipelines", "train", "eval", "docs"}

TOP_LEVEL = {"mmdlm", "configs", "docs", "data_pipelines", "train", "eval", "tests"}
NOT_A_ROOM = {"checkpoints"}  # folders of mmdlm that hold data

CORE_KNOWS = {"torch", "einops"}
ONLY_IN = {
    "accelerate": ("train", "eval"),
    "webdataset": ("data_pipelines",),
    "lm_eval": ("mmdlm.harnesses", "eval"),
    "lmms_eval": ("mmdlm.harnesses",),
    # of the extra `serve`; the command imports the room when it is asked to serve
    **dict.fromkeys(
        ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"), ("mmdlm.serving",)
    ),
}
LAZY_ONLY_IN = {
    "open_clip": ("mmdlm.vision", "mmdlm.rl.rewards"),
    "diffusers": ("mmdlm.vision", "mmdlm.rl.rewards"),
}
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open-clip-torch"}


@dataclass(frozen=True)
class Import:
    """One imported name; `lazy` when it runs inside a function, or only for the type checker."""

    name: str
    line: int
    lazy: bool
    typing_only: bool = False

    @property
    def package(self) -> str:
        return self.name.split(".")[0]


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """All imports of a source: statements, relative or not, and import_module("name")."""

    def visit(node: ast.AST, lazy: bool, typing: bool = False) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                yield from (Import(alias.name, node.lineno, lazy, typing) for alias in names)
            case ast.ImportFrom(module=target, names=names, level=level):
                parts = module.split(".") if is_package else module.split(".")[:-1]
                base = parts[: len(parts) - level + 1] if level else []
                prefix = ".".join([*base, *([target] if target else [])])
                yield from (
                    Import(f"{prefix}.{alias.name}", node.lineno, lazy, typing) for alias in names
                )
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(name, node.lineno, lazy)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or inside or typing_only, typing or typing_only)

    yield from visit(ast.parse(source), False)


def room_of(name: str) -> str | None:
    """The room that a dotted name lies in; None for what is not ours."""
    parts = name.split(".")
    for length in (2, 1):
        room = ".".join(parts[:length])
        if room in MAY_IMPORT:
            return room
    return None


def violations(
    source: str, module: str, *, runtime: set[str], is_package: bool = False
) -> list[str]:
    """One sentence for each import that breaks a rule; `runtime` are the wheel's dependencies."""
    room = room_of(module)
    assert room is not None, f"{module} lies in no room"
    found = []
    for one in imports(source, module, is_package=is_package):

        def report(rule: str, one: Import = one) -> None:
            found.append(f"{module}, line {one.line}: imports {one.name}, but {rule}")

        target = room_of(one.name)
        if target is not None:
            if target not in MAY_IMPORT[room]:
                report(f"{room} may import of ours only {sorted(MAY_IMPORT[room])}")
            continue
        if one.package in sys.stdlib_module_names:
            continue
        if one.package == "tests":
            report("nothing outside tests imports tests")
        elif room == "mmdlm.core" and one.package not in CORE_KNOWS:
            report(f"core knows only {sorted(CORE_KNOWS)} and the standard library")
        elif one.package in ONLY_IN:
            if room not in ONLY_IN[one.package]:
                report(f"only {' and '.join(ONLY_IN[one.package])} may")
        elif one.package in LAZY_ONLY_IN:
            if not _within(module, LAZY_ONLY_IN[one.package]):
                report(f"only {' and '.join(LAZY_ONLY_IN[one.package])} may")
            elif not one.lazy:
                report("it must be imported inside a function, so that others never load it")
        elif room in IN_WHEEL and not one.lazy and _distribution(one.package) not in runtime:
            report("it is no runtime dependency in pyproject.toml")
    return found


def _within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def _distribution(package: str) -> str:
    return DISTRIBUTION.get(package, package).lower().replace("_", "-")


@pytest.fixture(scope="module")
def runtime() -> set[str]:
    """Names of the wheel's dependencies, without extras and versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = (re.match(r"[\w.-]+", one) for one in project["dependencies"])
    return {name.group().lower().replace("_", "-") for name in names if name}


@pytest.mark.slow
def test_every_import_keeps_the_rules(project_files: list[Path], runtime: set[str]) -> None:
    sources = [
        path
        for path in project_files
        if path.suffix == ".py" and len(path.parts) > 1 and path.parts[0] in TOP_LEVEL - {"tests"}
    ]
    assert sources
    found = []
    for path in sources:
        is_package = path.name == "__init__.py"
        parts = path.parent.parts if is_package else path.with_suffix("").parts
        source = (ROOT / path).read_text()
        found += violations(source, ".".join(parts), runtime=runtime, is_package=is_package)
    assert not found, "\n".join(found)


def test_no_module_imports_itself_by_way_of_others(project_files: list[Path]) -> None:
    graph = import_graph(project_files)
    assert len(graph) > 100
    assert any(graph.values())
    found = cycles(graph)
    assert not found, "\n".join(" -> ".join([*one, one[0]]) for one in found)


@pytest.mark.parametrize(
    "graph, expected",
    [
        ({"a": {"b"}, "b": {"a"}}, [["a", "b"]]),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, [["a", "b", "c"]]),
        ({"a": {"a"}}, [["a"]]),
        ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, []),
    ],
)
def test_cycles_are_found(graph: dict[str, set[str]], expected: list[list[str]]) -> None:
    assert cycles(graph) == expected


def import_graph(files: list[Path]) -> dict[str, set[str]]:
    """Return what each module of ours imports of ours, in functions as well, by dotted names.

    An import that only the type checker runs is none.
    """
    modules = {}
    for path in files:
        if path.suffix == ".py" and len(path.parts) > 1 and path.parts[0] in TOP_LEVEL - {"tests"}:
            is_package = path.name == "__init__.py"
            parts = path.parent.parts if is_package else path.with_suffix("").parts
            modules[".".join(parts)] = (path, is_package)
    graph: dict[str, set[str]] = {}
    for name, (path, is_package) in modules.items():
        graph[name] = set()
        for one in imports((ROOT / path).read_text(), name, is_package=is_package):
            if one.typing_only:
                continue
            # "from package import module" names the module; "from module import thing" does not
            targets = (one.name, one.name.rpartition(".")[0])
            target = next((target for target in targets if target in modules), None)
            if target is not None:
                graph[name].add(target)
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1 or node in graph[node]:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_top_level_is_fixed(project_files: list[Path]) -> None:
    folders = {path.parts[0] for path in project_files if len(path.parts) > 1}
    assert {folder for folder in folders if not folder.startswith(".")} <= TOP_LEVEL


def test_every_folder_of_the_wheel_is_a_room_with_rules(project_files: list[Path]) -> None:
    folders = {p.parts[1] for p in project_files if p.parts[0] == "mmdlm" and len(p.parts) > 2}
    unknown = {folder for folder in folders - NOT_A_ROOM if f"mmdlm.{folder}" not in MAY_IMPORT}
    assert not unknown, f"give {sorted(unknown)} a line in MAY_IMPORT"


@pytest.mark.parametrize("folder", ["data_pipelines", "train", "eval"])
def test_folders_outside_the_wheel_have_a_docstring_and_nothing_else(folder: str) -> None:
    body = ast.parse((ROOT / folder / "__init__.py").read_text()).body
    assert len(body) == 1
    assert ast.get_docstring(ast.Module(body, []))


@pytest.mark.parametrize(
    "module, source",
    [
        ("mmdlm.core.sampling.sampler", "import numpy"),
        ("mmdlm.core.sampling.sampler", "from mmdlm.models.modeling import MmdlmConfig"),
        ("mmdlm.core.sampling.sampler", "from mmdlm import pipeline"),
        ("mmdlm.core.sampling.sampler", "from ...vision import pixels"),
        ("mmdlm.core.sampling.sampler", "def draw():\n    from mmdlm.vision import pixels"),
        (
            "mmdlm.core.sampling.sampler",
            "if TYPE_CHECKING:\n    from mmdlm.pipeline.model import Model",
        ),
        ("mmdlm.vision.pixels", "from mmdlm.models.families.llada import Llada"),
        ("mmdlm.templates.llada", "from mmdlm.vision.pixels import to_pixels"),
        ("mmdlm.models.families.llada", "import accelerate"),
        ("mmdlm.models.families.llada", "import diffusers"),
        ("mmdlm.models.families.llada", "import pandas"),
        ("mmdlm.vision.vq", "from diffusers import VQModel"),
        ("mmdlm.vision.vq", "VQModel = importlib.import_module('diffusers').VQModel"),
        ("mmdlm.rl.advantage", "def score():\n    import open_clip"),
        ("mmdlm.rl.rewards.clip", "import open_clip"),
        ("mmdlm.pipeline.model", "from data_pipelines.sources.emoji import draw_emoji"),
        ("mmdlm.pipeline.model", "import webdataset"),
        ("data_pipelines.shards.shards", "from accelerate import Accelerator"),
        ("data_pipelines.shards.shards", "from train.loop import fit"),
        ("train.loop", "from eval.emoji.benchmark import evaluate"),
        ("train.loop", "import webdataset as wds"),
        ("eval.emoji.benchmark", "import train.loop"),
        ("eval.emoji.benchmark", "from tests.fakes import Fake"),
    ],
)
def test_a_broken_rule_is_seen(module: str, source: str) -> None:
    assert len(violations(source, module, runtime={"torch", "einops", "numpy", "pillow"})) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        (
            "mmdlm.core.sampling.sampler",
            "import math, torch.nn.functional as F\nfrom einops import rearrange",
        ),
        (
            "mmdlm.core.sampling.sampler",
            "from mmdlm.core.sequence import Batch\nfrom . import schedule",
        ),
        ("mmdlm.models.families.llada", "from mmdlm.core.denoiser import Denoiser\nimport torch"),
        ("mmdlm.vision.vq", "def load():\n    from diffusers import VQModel"),
        ("mmdlm.vision.pixels", "from PIL import Image"),
        ("mmdlm.rl.rewards.clip", "def score():\n    import open_clip"),
        ("mmdlm.pipeline.model", "from mmdlm.vision.pixels import to_pixels"),
        ("mmdlm.cli.main", "import mmdlm"),
        (
            "data_pipelines.shards.shards",
            "import webdataset\nfrom mmdlm.core.sequence import Batch",
        ),
        ("train.loop", "import accelerate\nfrom data_pipelines.shards.shards import stream"),
        ("eval.emoji.benchmark", "import mmdlm\nfrom eval.metrics import psnr"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(source, module, runtime={"torch", "einops", "numpy", "pillow"}) == []


def test_relative_imports_are_resolved() -> None:
    names = [one.name for one in imports("from . import a\nfrom ..b import c", "x.y.z")]
    assert names == ["x.y.a", "x.b.c"]
    names = [one.name for one in imports("from . import a", "x.y", is_package=True)]
    assert names == ["x.y.a"]


def test_files_are_short() -> None:
    """A file of more lines holds two ideas."""
    rooms = ("mmdlm", "train", "data_pipelines", "eval")
    paths = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    lengths = {path: len(path.read_text().splitlines()) for path in paths}
    assert {path: count for path, count in lengths.items() if count > 450} == {}
    assert len(paths) > 250
