"""The pages that are made from the code: whole, and wrong about nothing."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from docs._generate import (
    benchmarks,
    command_line,
    departures,
    files_page,
    formats,
    log_keys,
)
from docs._generate.parsers import mmdlm_parser, runnable, subcommands
from docs._generate.tree import ROOT, modules
from mmdlm.cli.recipe import run
from train import rl

pytestmark = pytest.mark.slow  # the parsers of all commands are built


@pytest.fixture(scope="module")
def commands() -> dict[str, str]:
    return command_line.pages()


def test_every_command_and_recipe_has_a_section(commands: dict[str, str]) -> None:
    for name in subcommands(mmdlm_parser()):
        assert f"## `mmdlm {name}`" in commands["reference/cli.md"]
    assert "--negative-prompt" in commands["reference/cli.md"]
    for roof, page in (("train", "recipes"), ("data_pipelines", "jobs"), ("eval", "evaluation")):
        names = runnable(roof)
        assert len(names) > 2
        for name in names:
            assert f"## `python -m {name}`" in commands[f"reference/{page}.md"]


def test_recipes_list_fields_of_groups_and_classes_of_parts(commands: dict[str, str]) -> None:
    page = commands["reference/recipes.md"]
    assert "### `Objective`" in page
    assert "| `complementary` | `bool` | `False` | Every document twice" in page
    assert "train.optimizer.Muon" in page
    assert "| `--data` | [`Data`](#data) |  | What to train on. |" in page


def test_every_departure_of_a_docstring_is_on_the_page() -> None:
    page, listed = departures.page("# Departures"), departures.departures()
    shown = {one.path for one in listed}
    for module, path in modules("mmdlm", "train", "data_pipelines", "eval"):
        if re.search(r"\bDepartures?:", (ROOT / path).read_text()):
            assert path in shown, f"{module} names a departure that the page lacks"
    assert len(shown) > 5
    assert "arXiv:2505.15809" in page


def test_every_file_has_a_line() -> None:
    page = files_page.page()
    for _, path in modules("mmdlm", "train", "data_pipelines", "eval"):
        assert f"| `{path.name}` |" in page, path


def test_formats_are_read_off_files() -> None:
    page = formats.page((ROOT / "docs" / "reference" / "formats.md").read_text())
    assert "<!-- made:" not in page
    for known in ("codes.npy", "image_tokenizer/model.safetensors", "`prefix_attention`"):
        assert known in page


@pytest.mark.parametrize("path", sorted(benchmarks.DATA.glob("*.json")), ids=lambda p: p.stem)
def test_figures_say_where_they_are_from(path: Path) -> None:
    for table in json.loads(path.read_text())["tables"]:
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", table["date"])
        assert re.fullmatch(r"[0-9a-f]{7,40}", table["commit"])
        for key in ("hardware", "weights", "title"):
            assert table[key].strip()
        assert table["commands"]
        for image in table.get("images", []):
            assert (ROOT / ".github" / "media" / image["file"]).is_file()
    assert benchmarks.pages()[f"benchmarks/{path.stem}.md"].count("\nMeasured on ") >= 1


def test_log_keys_stand_in_the_code() -> None:
    assert log_keys.unknown_keys() == []


def test_what_a_run_logs_has_a_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config, steps = "configs/rl/smoke_text.yaml", "--training.max_steps"
    monkeypatch.setattr(sys, "argv", ["rl", "--config", config, "--out", str(tmp_path), steps, "1"])
    run(rl.main)
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    known = {key for group in log_keys.groups().values() for key in group}
    patterns = [re.escape(key).replace("NAME", r"\w+") for key in known]
    strays = [key for key in line if not any(re.fullmatch(one, key) for one in patterns)]
    assert not strays, f"docs/_generate/log_keys.yaml says nothing of {strays}"
