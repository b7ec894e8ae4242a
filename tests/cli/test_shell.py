"""Several inputs in one start, from pipes, files and folders; results as files, lines and JSON."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import mmdlm
from mmdlm.cli import commands
from mmdlm.cli import main as cli
from mmdlm.cli.model_table import MODELS
from mmdlm.cli.parser import with_dashes
from mmdlm.cli.results import stem_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> mmdlm.Model:
    """A real model with random weights behind every name; the current folder is an empty one."""
    found = mmdlm.load(tiny_checkpoint, device="cpu")
    monkeypatch.setattr(mmdlm, "load", lambda *_, **__: found)
    monkeypatch.chdir(tmp_path)
    return found


def piped(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


FEW = ["--steps", "2"]


def test_images_are_named_after_their_prompts_and_never_written_over(
    model: mmdlm.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["draw", "Red heart!", "caf\u00e9", *FEW]) == 0
    assert capsys.readouterr().out.split() == ["red-heart.png", "caf\u00e9.png"]
    before = Path("red-heart.png").read_bytes()
    assert cli.main(["draw", "red heart", "red heart", "--seed", "5", *FEW]) == 0
    assert capsys.readouterr().out.split() == ["red-heart-2.png", "red-heart-3.png"]
    assert Path("red-heart.png").read_bytes() == before
    Path("drawings").mkdir()
    assert cli.main(["draw", "red heart", "-o", "drawings", "--num-images", "2", *FEW]) == 0
    assert capsys.readouterr().out.split() == [
        "drawings/red-heart-1.png",
        "drawings/red-heart-2.png",
    ]
    assert stem_of("../.. \n") == "image"
    assert stem_of("a " * 100) == "-".join("a" * 20)


def test_each_of_several_prompts_is_drawn_as_by_a_command_of_its_own(
    model: mmdlm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["red heart", "woman dark skin tone", "woman light skin tone"]
    for number, prompt in enumerate(prompts):
        assert cli.main(["draw", prompt, "-o", f"{number}.png", "--seed", "3", *FEW]) == 0
    monkeypatch.setattr(commands, "IMAGES_AT_ONCE", 2)
    assert cli.main(["draw", *prompts, "-o", "all.png", "--seed", "3", *FEW]) == 0
    for number in range(3):
        alone = Path(f"{number}.png").read_bytes()
        assert Path(f"all-{number + 1}.png").read_bytes() == alone


def test_prompts_come_from_files_and_pipes(
    model: mmdlm.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.txt").write_text("\ufeffred heart\n\nblue heart\r\n", encoding="utf-8")
    piped(monkeypatch, "dog\ncat\n")
    assert cli.main(["draw", "@prompts.txt", "-", "sun", "--json", *FEW]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ["red heart", "blue heart", "dog", "cat", "sun"]
    assert records == [
        {"prompt": name, "seed": 0, "file": f"{name.replace(' ', '-')}.png"} for name in names
    ]


def test_a_text_may_be_all_of_an_input(
    model: mmdlm.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, "woman [MASK]\nskin tone\n")
    assert cli.main(["infill", "-", *FEW]) == 0
    said = capsys.readouterr().out
    assert said.startswith("woman ")
    assert said.endswith("\nskin tone\n")
    assert cli.main(["infill", "red [MASK]", "woman [MASK]", "--json", *FEW]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["text"] for record in records] == ["red [MASK]", "woman [MASK]"]
    assert cli.main(["complete", "red", "woman", "--max-new-tokens", "3", *FEW]) == 0
    assert re.match("red.*\nwoman", capsys.readouterr().out, re.DOTALL)


def test_folders_lists_and_files_are_captioned(
    model: mmdlm.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos/below").mkdir(parents=True)
    Path("photos/.cache").mkdir()
    for name in ("photos/b.png", "photos/below/a.PNG", "photos/.cache/x.png", "one.png"):
        Image.new("RGB", (16, 16), (200, 0, 0)).save(name)
    Path("photos/notes.txt").write_text("no image")
    Path("list.txt").write_text("one.png\nphotos/b.png\n")
    assert cli.main(["caption", "photos", "@list.txt", "one.png", "--json", *FEW]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["image"] for record in records] == [
        "photos/b.png",
        "photos/below/a.PNG",
        "one.png",
        "photos/b.png",
        "one.png",
    ]
    assert len({record["caption"] for record in records}) == 1
    piped(monkeypatch, "one.png\n")
    assert cli.main(["caption", "-", *FEW]) == 0
    assert capsys.readouterr().out == f"{records[0]['caption']}\n"


def test_a_bad_image_of_a_folder_is_named_and_the_others_are_captioned(
    model: mmdlm.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos").mkdir()
    Image.new("RGB", (16, 16), (200, 0, 0)).save("photos/b.png")
    Path("photos/a.png").write_text("no image")
    assert cli.main(["caption", "photos", *FEW]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith("photos/b.png\t")
    first, last = shown.err.splitlines()
    assert first.startswith("mmdlm: skipped cannot read 'photos/a.png'")
    assert last == "mmdlm: 1 of 2 images could not be read; see above"


def test_quiet_prints_results_only(
    model: mmdlm.Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["draw", "red heart", "--quiet", *FEW]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(["caption", "red-heart.png", "--quiet", *FEW]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip()
    assert shown.err == ""
    assert cli.main(["draw", "red heart", "--quiet", "--json", *FEW]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == "red-heart-2.png"


def test_inpainted_images_have_a_name(
    model: mmdlm.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (16, 16), (200, 0, 0)).save("heart.png")
    box = ["--box", "0,0,16,16", "--strength", "0.5"]
    assert cli.main(["inpaint", "heart.png", *box, *FEW]) == 0
    assert capsys.readouterr().out == "heart-inpainted.png\n"
    assert cli.main(["inpaint", "heart.png", *box[:2], "--strength", "2", *FEW]) == 2
    assert "strength must lie above 0 and at most at 1, got 2.0" in capsys.readouterr().err


def test_options_have_the_names_of_diffusers_and_of_recipes(
    model: mmdlm.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []
    for steps in ("--steps", "--num-inference-steps", "--num_inference_steps"):
        assert cli.main(["draw", "heart", "-o", "a.png", steps, "2", "--guidance_scale=1"]) == 0
        drawn.append(Path("a.png").read_bytes())
    assert drawn[0] == drawn[1] == drawn[2]
    assert with_dashes(["a_b", "--a_b=c_d", "-o", "x_y", "--", "--a_b"]) == [
        "a_b",
        "--a-b=c_d",
        "-o",
        "x_y",
        "--",
        "--a_b",
    ]


def test_models_are_those_of_the_templates_and_the_readme(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mmdlm.templates.auto import LAYOUTS

    names = {"draw": "text_to_image"}
    for row in MODELS:
        tasks = set(LAYOUTS[row.name].tasks) - {"draw_trajectory"}
        assert {names.get(task, task) for task in row.tasks} == tasks, row.name
    assert {row.name for row in MODELS} | {"mmdlm-seeing"} == set(LAYOUTS)

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    together = {"LaViDa on LLaDA": "LaViDa on LLaDA, on Dream"}
    together["LaViDa on Dream"] = together["LaViDa on LLaDA"]
    for row in MODELS[1:]:
        start = f"| {together.get(row.models, row.models)} |"
        lines = [line for line in readme.splitlines() if line.startswith(start)]
        assert len(lines) == 1, row.models
        cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
        assert row.parameters in cells[1]
        assert row.memory == cells[2]
        assert row.license == cells[5]
    assert cli.main(["models", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["name"] for one in found] == [row.name for row in MODELS]
    assert cli.main(["models"]) == 0
    assert "GSAI-ML/LLaDA-8B-Instruct" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_commands_options_and_choices(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "mmdlm.bash"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        asked = " ".join(f"'{word}'" for word in ("mmdlm", *words))
        lines = (
            f"source {script}\nCOMP_WORDS=({asked})\nCOMP_CWORD={len(words)}\n"
            "$(complete -p mmdlm | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
            "printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, check=False)
        return done.stdout.split()

    assert completed("dr") == ["draw"]
    assert "--num-images" in completed("draw", "--num-")
    assert completed("draw", "--cache", "pre") == ["prefix"]
    assert cli.main(["completion", "zsh"]) == 0
    assert "#compdef mmdlm" in capsys.readouterr().out


def test_seeds_are_those_of_single_calls(model: mmdlm.Model) -> None:
    assert cli.main(["draw", "heart", "sun", "--num-images", "2", "--seed", "7", *FEW]) == 0
    assert cli.main(["draw", "sun", "-o", "alone.png", "--seed", "8", *FEW]) == 0
    assert Path("sun-2.png").read_bytes() == Path("alone.png").read_bytes()
