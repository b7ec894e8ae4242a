"""Edits, questions and styles: an oracle reaches everything, who knows nothing reaches nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_pipelines import emoji_set
from eval.emoji import tasks as emoji_tasks
from eval.emoji.tasks import Known, TaskSet, measure_edits, measure_questions, measure_styles
from mmdlm.cli import recipe as command_line
from tests.data_pipelines.tiny_icons import tiny_emoji, write_icons

pytest.importorskip("resvg_py")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the job writes for a few emoji."""
    folder = tmp_path_factory.mktemp("tasks")
    icons = write_icons(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_set, "find_font", lambda: Path(__file__))
        patch.setattr(emoji_set, "draw_with_report", lambda font, size: (tiny_emoji(icons), []))
        patch.setattr("data_pipelines.sources.emoji.HELD_OUT_IN_A_STYLE", 3)
        patch.setattr(emoji_set, "MEASURED_EDITS", 8)
        emoji_set.main(icons, folder / "images")
    return folder / "images"


@dataclass
class Oracle:
    """Looks up what is asked for; `right` false: the first that there is."""

    known: Known
    tasks: TaskSet
    right: bool = True

    def edit(self, image: Image.Image, instruction: str, *, generator: torch.Generator):
        for source, target, text in self.tasks.edits:
            same = self.known.images[source].tobytes() == image.tobytes()
            if self.right and same and text == instruction:
                return self.known.images[target]
        return Image.new("RGB", image.size, (255, 0, 255))

    def answer(self, questions, images, *, generator):
        found = {(q, i.tobytes()): a for _, q, a, i in self.tasks.questions}
        return [
            found[question, image.tobytes()] if self.right else "maybe"
            for question, image in zip(questions, images, strict=True)
        ]

    def caption(self, images, *, generator):
        places = {one.tobytes(): place for place, one in enumerate(self.known.images)}
        return [
            self.known.captions[places[image.tobytes()]] if self.right else "" for image in images
        ]

    def text_to_image(self, captions, *, generator):
        return [self.known.images[self.known.captions.index(one)] for one in captions]


def test_what_the_job_wrote_is_read(images: Path) -> None:
    known = Known.read(images)
    tasks = TaskSet.read(images, known)
    assert len(known.held_out) == 3
    assert {known.styles[place] for place in known.held_out} <= {"twemoji", "fluent"}
    assert len(tasks.edits) == 8
    assert all("<image>" not in text for _, _, text in tasks.edits)
    assert tasks.questions


@pytest.mark.parametrize("right", [True, False])
def test_edits_and_questions(images: Path, right: bool) -> None:
    known = Known.read(images)
    tasks = TaskSet.read(images, known)
    oracle = Oracle(known, tasks, right)
    generator = torch.Generator().manual_seed(0)
    edited = measure_edits(oracle, known, tasks.edits, generator=generator)
    assert edited["edit_nearest_of_all"]["value"] == float(right)
    answered = measure_questions(oracle, tasks.questions, batch_size=3, generator=generator)
    assert answered["question"]["value"] == float(right)
    assert answered["question"]["count"] == len(tasks.questions)
    kinds = {kind for kind, *_ in tasks.questions}
    assert kinds == answered.keys() - {"question"}


def test_styles(images: Path) -> None:
    known = Known.read(images)
    oracle = Oracle(known, TaskSet.read(images, known))
    generator = torch.Generator().manual_seed(0)
    found = measure_styles(oracle, known, known.held_out, batch_size=2, generator=generator)
    assert found["style_among_20_of_the_style"]["value"] == 1.0
    assert found["style_caption_exact"]["count"] == 3


def test_bad_input_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, says in (
        (["--images", str(tmp_path), "--limit", "0"], "--limit 0"),
        (["--images", str(tmp_path / "none")], "none"),
    ):
        monkeypatch.setattr(sys, "argv", ["emoji_tasks", *arguments])
        with pytest.raises(SystemExit) as caught:
            command_line.run(emoji_tasks.main)
        assert caught.value.code == 2
        assert says in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_report_is_whole(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known.read(images)
    oracle = Oracle(known, TaskSet.read(images, known))
    oracle.device = torch.device("cpu")  # type: ignore[attr-defined]
    monkeypatch.setattr(emoji_tasks, "load", lambda name, device: oracle)
    monkeypatch.setattr(emoji_tasks, "describe_model", lambda name, model: {"name": name})
    emoji_tasks.main(images, out=tmp_path / "a" / "report.json", limit=4)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["results"]["question"]["count"] == 4
    assert report["settings"] == {"limit": 4, "batch_size": 32, "seed": 0}
