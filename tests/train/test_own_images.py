"""One command from a folder of images to a model: the whole walk, kills, stops, and bad input."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import mmdlm
from data_pipelines.shards import shards
from mmdlm.cli import main as cli
from mmdlm.cli.recipe import run
from tests.data_pipelines.test_sole_writer import holder
from tests.train.tiny import Run, logged, own_images
from train.image_folder.stages import OwnRun
from train.own_images import main

COLORS = ("red", "green", "blue", "black", "orange", "purple")
SHAPES = ("square", "circle", "line", "ring")
WEIGHTS = "model/final/model.safetensors"
# As it is about to write these: a checkpoint of each stage, the codes, and the card at the end.
KILLED_BEFORE = (
    "image_tokenizer/step_00000012",
    "codes/train/000000.tar",
    "model/step_00000012",
    "final/README.md",
)

Command = Callable[..., tuple[int, str, str]]


def draw_images(folder: Path, *, count: int = 24) -> Path:
    """Images whose names are their captions, of another shape than a square."""
    folder.mkdir(parents=True)
    for color, shape in list(product(COLORS, SHAPES))[:count]:
        image = Image.new("RGB", (48, 40), "white")
        pen, box = ImageDraw.Draw(image), (10, 8, 34, 32)
        match shape:
            case "square":
                pen.rectangle(box, fill=color)
            case "circle":
                pen.ellipse(box, fill=color)
            case "line":
                pen.line(box, fill=color, width=5)
            case "ring":
                pen.ellipse(box, outline=color, width=5)
        image.save(folder / f"{color}_{shape}.png")
    return folder


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    tiny = ["--size", "32", "--hours", "0.0001", "--threads", "1"]
    return ["--images", str(images), "--out", str(out), *tiny, *more]


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images, and the folder of a whole run."""
    base = tmp_path_factory.mktemp("walk")
    images, out = draw_images(base / "images"), base / "run"
    ran = Run(own_images, arguments(images, out), folder=base)
    assert ran.exit_code() == 0, ran.errors.read_text()
    return images, out


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """command(*arguments) -> exit status, output and errors of the command in this process."""

    def call(*given: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["own_images", *given])
        status = 0
        try:
            run(main)
        except SystemExit as error:
            status = int(error.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


@pytest.fixture
def only_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends when the images are read, before anything is trained."""

    def end(self: OwnRun) -> None:
        raise ValueError("read")

    monkeypatch.setattr(OwnRun, "learn_words", end)


# ---- the walk ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_comes_out(walk, tmp_path, capsys):
    _, out = walk
    model = mmdlm.load(out / "model" / "final")
    drawn = model.text_to_image("red square", generator=torch.Generator().manual_seed(0))
    assert drawn[0].size == (32, 32)
    assert model.defaults.caption.order == "left_to_right"
    card = (out / "model" / "final" / "README.md").read_text()
    assert "held out" in card
    (usage,) = (line for line in card.splitlines() if line.startswith("python -m mmdlm.cli draw"))
    image = tmp_path / "out.png"
    words = [str(image) if word == "out.png" else word for word in shlex.split(usage)[3:]]
    assert cli.main(words) in (0, None)
    with Image.open(image) as image:
        assert image.size == (32, 32)


def test_its_page_needs_nothing_else(walk):
    _, out = walk
    page = (out / "index.html").read_text()
    assert "Finished" in page
    assert page.count("<svg") == 2  # the curves of both stages
    assert "http-equiv" not in page  # no more to come
    for stage in ("image_tokenizer", "model"):
        looks = sorted((out / "looks").glob(f"{stage}_*.json"))
        assert len(looks) >= 2
        for look in looks:
            images = json.loads(look.read_text())["images"]
            assert all(one.startswith("data:image/png;base64,") and one in page for one in images)
    assert "black circle" in page
    assert page.count("src=") == page.count('src="data:')


def test_images_are_held_out_of_all_training(walk):
    _, out = walk
    held_out = json.loads((out / "data" / "index.json").read_text())["summary"]["held_out"]
    assert held_out > 0
    for folder in ("data", "codes"):
        kept = {part: sorted(names(out / folder / part)) for part in ("train", "held_out")}
        assert len(kept["held_out"]) == held_out
        assert len(kept["train"]) == 24 - held_out
        assert not set(kept["train"]) & set(kept["held_out"])


def names(folder: Path) -> list[str]:
    found = (sample for url in folder.glob("*.tar") for sample in shards.read_shard(str(url)))
    return [sample["txt"].decode() for sample in found]


def test_a_finished_run_says_so(walk, command):
    images, out = walk
    before = (out / WEIGHTS).stat().st_mtime_ns
    status, said, _ = command(*arguments(images, out))
    assert status == 0
    assert "is finished" in said
    assert (out / WEIGHTS).stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_continues_exactly(walk, tmp_path):
    images, out = walk
    plan = json.loads((out / "plan.json").read_text())  # steps follow from the speed: the same
    for stage in ("image_tokenizer", "model"):
        plan[stage]["save_steps"] = 6
    again = tmp_path / "run"
    again.mkdir()
    (again / "plan.json").write_text(json.dumps(plan))
    for moment in KILLED_BEFORE:
        killed = Run(own_images, arguments(images, again), moment, folder=tmp_path)
        assert killed.exit_code() == -signal.SIGKILL, killed.errors.read_text()
    last = Run(own_images, arguments(images, again), folder=tmp_path)
    assert last.exit_code() == 0, last.errors.read_text()
    for stage in ("image_tokenizer", "model"):
        norms = [[entry["grad_norm"] for entry in logged(one / stage)] for one in (out, again)]
        assert norms[0] == norms[1]
    for look in sorted((out / "looks").iterdir()):
        assert (again / "looks" / look.name).read_text() == look.read_text()
    first, second = load_file(out / WEIGHTS), load_file(again / WEIGHTS)
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- other options, other images, stops ----------------------------------------------------------


def test_other_options_and_other_images_are_refused(tmp_path, command, only_reading):
    images, out = draw_images(tmp_path / "images"), tmp_path / "run"
    assert command(*arguments(images, out))[0] == 2
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    status, _, errors = command(*arguments(images, out, "--seed", "1"))
    assert status == 2
    assert "begun with seed 0, not 1" in errors
    (images / "red_square.png").rename(images / "red_box.png")
    status, _, errors = command(*arguments(images, out))
    assert status == 2
    assert "has changed since" in errors
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_sigterm_ends_it_and_says_how_to_go_on(tmp_path, command, monkeypatch):
    images, out = draw_images(tmp_path / "images"), tmp_path / "run"
    monkeypatch.setattr(OwnRun, "learn_words", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    status, _, errors = command(*arguments(images, out))
    assert status == 143
    assert "the same command" in errors


def test_a_full_disk_loses_nothing(tmp_path, command, only_reading, monkeypatch):
    images, out = draw_images(tmp_path / "images"), tmp_path / "run"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(shards.os, "fsync", full)
        status, _, errors = command(*arguments(images, out))
    assert status == 2
    assert "No space left" in errors
    status, said, errors = command(*arguments(images, out))
    assert "24 images" in said
    assert errors.endswith("error: read\n")


def test_a_second_command_leaves_the_first_alone(tmp_path, command):
    images, out = draw_images(tmp_path / "images"), tmp_path / "run"
    first = holder(out)
    try:
        status, _, errors = command(*arguments(images, out))
    finally:
        first.kill()
    assert status == 2
    assert f"is being written by process {first.pid}" in errors


# ---- input ---------------------------------------------------------------------------------------


def test_what_was_read_is_shown_before_anything_is_trained(tmp_path, command, only_reading):
    images = draw_images(tmp_path / "images")
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (images / "gone.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("RGBA", (40, 40), (255, 255, 255, 0)).save(images / "nothing.png")
    _, said, errors = command(*arguments(images, tmp_path / "run"))
    assert errors.endswith("error: read\n")
    assert "24 images" in said
    assert "24 distinct captions of 10 distinct words" in said
    assert "48 x 40" in said
    assert "broken.png" in said
    assert "nothing.png" in said
    assert said.count(f"{images}/") >= 20  # examples


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda images: [path.unlink() for path in images.iterdir()], "no images in it"),
        (lambda images: [path.unlink() for path in sorted(images.iterdir())[1:]], "only 1 image"),
        (lambda images: [caption(path, "a cat") for path in sorted(images.iterdir())], "'a cat'"),
        (
            lambda images: [path.rename(path.with_suffix(".txt")) for path in images.iterdir()],
            "no images in it",
        ),
        (lambda images: [path.write_bytes(b"") for path in images.iterdir()], "no samples found"),
    ],
    ids=["empty", "one", "alike", "captions alone", "all broken"],
)
def test_bad_images_are_one_sentence(tmp_path, command, spoil, said):
    images, out = draw_images(tmp_path / "images"), tmp_path / "run"
    spoil(images)
    status, _, errors = command(*arguments(images, out))
    assert status == 2
    (sentence,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert said in sentence


def caption(image: Path, text: str) -> None:
    image.with_suffix(".txt").write_text(text)


@pytest.mark.slow
def test_images_that_were_no_set_may_be_mended(tmp_path, command, only_reading):
    images, out = draw_images(tmp_path / "images"), tmp_path / "run"
    for path in sorted(images.glob("*.png")):
        caption(path, "a thing")
    assert "'a thing'" in command(*arguments(images, out))[2]
    for path in images.glob("*.txt"):
        path.write_text(path.stem)
    _, said, errors = command(*arguments(images, out))
    assert "24 distinct captions" in said
    assert errors.endswith("error: read\n")


@pytest.mark.parametrize(
    "more, said",
    [
        (["--size", "33"], "size is 33"),
        (["--hours", "0"], "hours is 0"),
        (["--hours", "nan"], "nan"),
        (["--held_out", "0.9"], "held_out is 0.9"),
        (["--start", "emoji"], "it draws 64 pixels, not 32"),
        (["--start", "elsewhere"], "elsewhere"),
        (["--prompts", f"[{'very ' * 40}red square]"], "give a shorter one"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, command, more, said):
    images = draw_images(tmp_path / "images")
    status, _, errors = command(*arguments(images, tmp_path / "run", *more))
    assert status == 2
    assert said in errors
    assert "Traceback" not in errors


def test_a_folder_of_something_else_is_left_alone(tmp_path, command):
    images, out = draw_images(tmp_path / "images"), tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    status, _, errors = command(*arguments(images, out))
    assert status == 2
    assert "thesis.txt" in errors
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    status, _, errors = command(*arguments(images, images / "run"))
    assert status == 2
    assert "lie in each other" in errors
