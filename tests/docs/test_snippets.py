"""Every block and command of the README and the docs parses, and runs where it takes seconds."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import jsonargparse
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from docs._generate.parsers import mmdlm_main, mmdlm_parser, parser_of, subcommands, task_parser
from eval.run import task_of
from mmdlm.cli.recipe import run
from tests.docs.blocks import ROOT, SHELLS, Block, blocks, commands, inline_commands
from train import rl

YOURS = ("my_module", "my_rewards")  # modules that a reader writes, from the blocks of the pages
SMOKE = {
    "train.pretrain": "configs/pretrain/smoke.yaml",
    "train.sft": "configs/sft/smoke.yaml",
    "train.rl": "configs/rl/smoke_text.yaml",
}
PYTHON, SHELL = blocks("python"), blocks(*SHELLS)


@pytest.fixture
def yours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, where the classes and functions of the pages can be imported."""
    defined = [
        ast.unparse(node)
        for block in PYTHON
        if block.runs
        for node in ast.parse(block.code).body
        if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef)
    ]
    for name in YOURS:
        source = "from __future__ import annotations\n" + "\n".join(defined)
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_import_what_is_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module not in YOURS:
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in PYTHON if block.runs], ids=str)
def test_python_blocks_run(block: Block, yours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("block")
    monkeypatch.setitem(sys.modules, "block", module)  # where dataclasses look for it
    exec(compile(block.code, str(block), "exec"), vars(module))


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_blocks_parse(block: Block, yours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where configs are
    for words in commands(block.code):
        check(words)


@pytest.mark.slow
@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_of_the_bundled_model_run(
    block: Block, yours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = 0
    for words in commands(block.code):
        if words[0] == "mmdlm" and words[1] != "convert" and "--model" not in words:
            assert mmdlm_main()(words[1:]) == 0, capsys.readouterr().err
            ran += 1
    if not ran:
        pytest.skip("no command of the bundled model in it")


@pytest.mark.parametrize("page, words", inline_commands(), ids=lambda value: str(value))
def test_commands_in_sentences_name_what_is_there(page: str, words: list[str]) -> None:
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    if words[0] == "make":
        check(words)
        return
    if words[0] == "pip":
        return
    parser: argparse.ArgumentParser = mmdlm_parser()
    if words[0] == "mmdlm":
        rest = words[1:]
    elif "-m" in words:
        rest = words[words.index("-m") + 1 :]
        if not rest or not re.fullmatch(r"[\w.]+", rest[0]):
            return  # "python -m" as a word of a sentence
        parser, rest = parser_of(rest[0]), rest[1:]
    else:
        return
    if rest and rest[0] in subcommands(parser):
        parser = subcommands(parser)[rest[0]]
    elif rest and subcommands(parser) and not rest[0].startswith("-"):
        raise AssertionError(f"{page}: there is no command {rest[0]!r}")
    known = {name for action in parser._actions for name in action.option_strings}
    for option in options:
        roots = {option, option.split(".")[0]}
        assert roots & known, f"{page}: {' '.join(words)!r} has the unknown option {option}"


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_blocks_are_keys_of_a_recipe(
    block: Block, yours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = re.match(r"# (keys|a whole recipe) of ([\w.]+)\n", block.code)
    assert first is not None, (
        f"{block}: the first line is to say '# keys of' or '# a whole recipe of', and train.NAME"
    )
    assert isinstance(yaml.safe_load(block.code), dict)
    (yours / "block.yaml").write_text(block.code)
    monkeypatch.chdir(ROOT)
    below = ["--config", SMOKE[first[2]]] if first[1] == "keys" else []
    parse(first[2], [*below, "--config", str(yours / "block.yaml")])


WHOLE = [block for block in blocks("yaml") if block.code.startswith("# a whole recipe of train.rl")]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", WHOLE, ids=str)
def test_whole_recipes_of_rl_run(
    block: Block, yours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the files that the Python blocks of its page write; the reward rises."""
    for other in PYTHON:
        if other.page == block.page:
            exec(compile(other.code, str(other), "exec"), {})
    (yours / "my_rl.yaml").write_text(block.code)
    fewer = ["--training.max_steps", "8", "--training.save_steps", "8"]
    monkeypatch.setattr(sys, "argv", ["train.rl", "--config", "my_rl.yaml", *fewer])
    run(rl.main)
    (log,) = yours.glob("runs/*/log.jsonl")
    rewards = [json.loads(line)["rewards/short/mean"] for line in log.read_text().splitlines()]
    assert len(rewards) == 8
    assert sum(rewards[-2:]) > sum(rewards[:2])


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_blocks_are_json(block: Block) -> None:
    json.loads(block.code)


def test_each_reason_not_to_run_is_beside_a_block() -> None:
    reasons = sum((ROOT / page).read_text().count("<!-- not run:") for page in _pages())
    assert reasons == sum(not block.runs for block in blocks("python", "bash", "sh", "yaml"))


@pytest.mark.parametrize(
    "words",
    [
        ["mmdlm", "draw", "x", "-o", "y.png", "--stepz", "3"],
        ["mmdlm", "paint", "x"],
        ["python", "-m", "train.pretrain", "--config", "configs/pretrain/none.yaml"],
        ["make", "nothing"],
        ["pip", "install", ".[none]"],
        ["frobnicate"],
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_found(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, ValueError)):
        check(words)


def _pages() -> set[str]:
    return {block.page for block in blocks("python", "bash", "sh", "yaml")}


def check(words: list[str]) -> None:
    """Raise AssertionError or ValueError for a command that its program would refuse."""
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "mmdlm":
        mmdlm_parser().parse_args(rest)
    elif program == "python" and rest[:2] == ["-m", "accelerate.commands.launch"]:
        check(["accelerate", "launch", *rest[2:]])
    elif program == "python":
        assert rest[0] == "-m", f"{words}: only modules are run"
        parse(rest[1], rest[2:])
    elif program == "accelerate":
        given = launch_command_parser().parse_args(rest[1:])
        assert given.module, f"{words}: recipes are modules; add -m"
        parse(given.training_script, given.training_script_args)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        wanted = [word for word in rest if not word.startswith("-")]
        unknown = [word for word in wanted if word not in targets and "/" not in word]
        assert not unknown, f"the Makefile has no target {unknown[0]!r}"
    elif program == "pip":
        extras = re.search(r"\[([\w,]+)\]", rest[-1])
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        for extra in extras[1].split(",") if extras else ():
            assert extra in known, f"pyproject.toml has no extra {extra!r}"
    elif program == "curl":  # asks a server: its body has to be JSON
        json.loads(rest[rest.index("-d") + 1])
    else:
        others = ("git", "cd", "source", "apt-get", "lmms-eval")
        assert program in others, f"{program!r} is no command of ours"


def parse(module: str, arguments: list[str]) -> None:
    """Parse the options of a module, files of `--config` included; my_*.yaml is a smoke run."""
    arguments = [SMOKE[module] if re.match(r"my_\w+\.yaml$", one) else one for one in arguments]
    parser, errors = parser_of(module), io.StringIO()
    if module == "eval.run":
        given, _ = parser.parse_known_args(arguments)
        parser = task_parser(given.task or str(task_of(given.config)))
    try:
        with contextlib.redirect_stderr(errors):
            given = parser.parse_args(arguments)
            if isinstance(parser, jsonargparse.ArgumentParser):
                parser.instantiate(given)  # nested keys are checked by this
    except (SystemExit, ValueError, jsonargparse.ArgumentError) as error:
        raise AssertionError(f"python -m {module}: {errors.getvalue() or error}") from error
