"""The emoji benchmark: an oracle reaches everything, noise chance; the files say what was done."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import eval.emoji.benchmark as benchmark
import eval.emoji.gallery as gallery_of
import eval.emoji.measures as measures
from data_pipelines.shards.shards import write_shard
from data_pipelines.sources.emoji import Emoji, LeftOut, find_font
from data_pipelines.sources.image_text import ImageText, Tasks
from data_pipelines.sources.source import encode_array
from data_pipelines.write_shards import png_bytes
from eval.emoji.answers import Asked
from eval.emoji.benchmark import main
from eval.emoji.gallery import Gallery, kind
from eval.emoji.measures import Split, document, likelihood, measure
from mmdlm import load
from mmdlm.cli import recipe as command_line
from mmdlm.pipeline.model import Model
from mmdlm.pipeline.task_defaults import Defaults

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "tests" / "data" / "emoji_images.tar"
TONES = ("light", "medium", "dark")
QUICK = {
    "steps": 1,
    "caption_steps": 1,
    "batch_size": 16,
    "likelihood_items": 2,
    "speed_repeats": 1,
    "sheet_images": 4,
}


def image(seed: int) -> Image.Image:
    """A coarse random pattern, 64 x 64."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((64, 64), Image.Resampling.NEAREST)


def some_emoji() -> list[Emoji]:
    """40 with names and images of their own, two of them alike; every fifth is held out."""
    toned = [
        (f"{who} {tone} skin tone", chr(0x1F466 + n) + chr(0x1F3FB + 2 * t))
        for (n, who), (t, tone) in itertools.product(
            enumerate(("boy", "girl", "man", "woman")), enumerate(TONES)
        )
    ]
    plain = [(f"thing {n}", chr(0x1F680 + n)) for n in range(26)]
    flags = [("Norway", "\U0001f1f3\U0001f1f4"), ("Bouvet Island", "\U0001f1e7\U0001f1fb")]
    return [
        Emoji(
            name=name,
            names={"en": name},
            aliases=(),
            characters=characters,
            image=image(1000 if (name, characters) in flags else n),
            held_out="skin tone" in name and n % 3 == 0,
        )
        for n, (name, characters) in enumerate([*toned, *plain, *flags])
    ]


@pytest.fixture
def gallery() -> Gallery:
    return Gallery.of(some_emoji(), {"font": "none"})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a font that has these emoji and lacks one; the current folder is empty."""
    font = tmp_path / "font.ttf"
    font.write_bytes(b"a font")

    def draw_emoji(path: Path, *, size: int) -> list[Emoji | LeftOut]:
        assert path == font
        return [*some_emoji(), LeftOut("new", "?", "not in the font")]

    monkeypatch.setattr(gallery_of, "draw_emoji", draw_emoji)
    monkeypatch.setattr(benchmark, "find_font", lambda: font)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- models that know everything, or nothing


@dataclass
class Lossless:
    """Reconstructs every image, as its one code is the number of an image that it keeps."""

    image_size: int = 64
    kept: list[Tensor] = field(default_factory=list)

    def encode(self, pixels: Tensor) -> Tensor:
        self.kept.extend(pixels)
        return torch.arange(len(self.kept) - len(pixels), len(self.kept))[:, None]

    def decode(self, codes: Tensor) -> Tensor:
        return torch.stack([self.kept[int(code)] for code in codes])


@dataclass
class Oracle:
    """Looks everything up; of names drawn alike it says the last one."""

    gallery: Gallery
    image_tokenizer: Lossless = field(default_factory=Lossless)
    defaults: Defaults = Defaults()
    device: torch.device = torch.device("cpu")

    def caption(
        self, images: list[Image.Image], *, num_inference_steps: int, generator: torch.Generator
    ) -> list[str]:
        names = {one.image.tobytes(): one.name for one in self.gallery.emoji}
        return [names[image.tobytes()] for image in images]

    def text_to_image(
        self,
        names: list[str],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator,
    ) -> list[Image.Image]:
        images = {one.name: one.image for one in self.gallery.emoji}
        return [images[name] for name in names]


class Noise(Oracle):
    """Says a name and draws an image at random."""

    def caption(
        self, images: list[Image.Image], *, num_inference_steps: int, generator: torch.Generator
    ) -> list[str]:
        drawn = torch.randint(len(self.gallery.emoji), (len(images),), generator=generator)
        return [self.gallery.emoji[i].name for i in drawn]

    def text_to_image(
        self,
        names: list[str],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator,
    ) -> list[Image.Image]:
        drawn = torch.randint(len(self.gallery.emoji), (len(names),), generator=generator)
        return [self.gallery.emoji[i].image for i in drawn]


class BlindToTones(Oracle):
    """Knows everything but the tone of a skin, which it always takes for dark."""

    def caption(
        self, images: list[Image.Image], *, num_inference_steps: int, generator: torch.Generator
    ) -> list[str]:
        names = super().caption(images, num_inference_steps=1, generator=generator)
        return [name.replace("light", "dark").replace("medium", "dark") for name in names]


def ask_about(model: Oracle, gallery: Gallery, places: list[int]) -> Split:
    asked = replace(Asked.of(model, None, None, None), batch_size=16)
    return measure(model, gallery, places, asked, likelihood_items=0, title="all")


def means(split: Split) -> dict[str, float]:
    return {key: found["value"] for key, found in split.results["measures"].items()}


def test_an_oracle_reaches_everything(gallery: Gallery) -> None:
    found = means(ask_about(Oracle(gallery), gallery, list(range(40))))
    assert found == {key: 100.0 if key.endswith("psnr") else 1.0 for key in found}


def test_noise_reaches_chance(gallery: Gallery) -> None:
    """Of 39 distinct images among 40, and of images alike either name is right."""
    places = list(range(40)) * 10
    found = means(ask_about(Noise(gallery), gallery, places))
    chance = (38 / 40 + 2 * 2 / 40) / 40
    assert found["caption_exact"] == pytest.approx(chance, abs=4 * math.sqrt(chance / 400))
    assert found["drawing_top_1"] == pytest.approx(chance, abs=4 * math.sqrt(chance / 400))
    assert found["drawing_top_1"] < found["drawing_top_5"] < 0.3


def test_a_wrong_tone_is_told_from_a_wrong_subject(gallery: Gallery) -> None:
    toned = [i for i, one in enumerate(gallery.emoji) if "skin tone" in one.name]
    found = means(ask_about(BlindToTones(gallery), gallery, toned))
    assert found["caption_exact"] == pytest.approx(1 / 3)
    assert found["caption_but_for_tones"] == 1.0
    assert 0.7 < found["caption_words"] < 1.0


def test_kinds_are_told_apart(gallery: Gallery) -> None:
    by_name = {one.name: kind(one) for one in gallery.emoji}
    assert by_name["Norway"] == "flag"
    assert by_name["thing 0"] == "no skin tone"
    assert by_name["boy dark skin tone"] == "one skin tone"
    split = ask_about(Oracle(gallery), gallery, list(range(40)))
    counts = {
        name: found["caption_exact"]["count"] for name, found in split.results["by_kind"].items()
    }
    assert counts == {"flag": 2, "no skin tone": 26, "one skin tone": 12}


# ---- likelihood


@pytest.fixture
def model(tiny_checkpoint: Path) -> Model:
    return load(tiny_checkpoint, device="cpu")


def test_a_uniform_model_has_the_likelihood_of_a_uniform_draw(
    model: Model, gallery: Gallery
) -> None:
    with torch.no_grad():
        model.denoiser.lm_head.weight.zero_()
    asked = replace(Asked.of(model, None, None, None), batch_size=2)
    found = likelihood(model, gallery, [0, 1, 2], asked, title="all")
    vocabulary, tokenizer = model.denoiser.vocabulary, model.image_tokenizer
    codes = (tokenizer.image_size // tokenizer.downsampling) ** 2
    name = model.text_slots * math.log(vocabulary.text[1] - vocabulary.text[0])
    # n / k of k tokens is exactly n, whatever is drawn
    assert found["name_nelbo"].tolist() == pytest.approx([name] * 3, rel=1e-4)
    assert found["image_nelbo"].tolist() == pytest.approx(
        [codes * math.log(vocabulary.image_codes)] * 3, rel=1e-4
    )


@pytest.mark.parametrize("target, task", [("image", "draw"), ("name", "caption")])
def test_likelihood_is_of_the_documents_that_models_are_trained_on(
    model: Model, target: str, task: str
) -> None:
    codes = torch.arange(16)
    sample = {"txt": b"red heart", "codes.npy": encode_array(codes.numpy())}
    to_sequence = ImageText(
        Tasks(draw=task == "draw", caption=task == "caption"),
        text_slots=model.text_slots,
        drop_condition=0.0,
    )
    trained = to_sequence(
        sample,
        model.denoiser.vocabulary,
        tokenizer=model.text_tokenizer,
        generator=torch.Generator(),
    )
    asked = document(model, "red heart", codes, target=target)
    for one, other in zip(asked.segments, trained.segments, strict=True):
        assert one.modality == other.modality
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.target, other.target)


# ---- the whole


def test_it_reports_what_was_measured_on_what(
    drawn: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(str(tiny_checkpoint), **QUICK, seed=3, device="cpu")
    report = json.loads((drawn / "runs/eval/emoji.json").read_text())
    counts = {name: found["count"] for name, found in report["results"].items()}
    assert counts == {"trained": 36, "held-out": 4}
    for found in report["results"].values():
        assert set(found["measures"]) == set(measures.MEASURES)
        low, high = found["measures"]["caption_exact"]["interval_95"]
        assert low <= found["measures"]["caption_exact"]["value"] <= high
    weights = (tiny_checkpoint / "model.safetensors").read_bytes()
    assert report["model"]["sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert "image_tokenizer/model.safetensors" in report["model"]["sha256"]
    assert report["model"]["parameters"]["denoiser"] > 0
    assert report["settings"]["seed"] == 3
    assert report["settings"]["text_to_image"]["num_inference_steps"] == 1
    assert report["settings"]["caption"]["num_inference_steps"] == 1
    assert report["hardware"]["threads"] == torch.get_num_threads()
    assert [(row["task"], row["batch_size"]) for row in report["speed"]] == [
        ("drawing", 1),
        ("captioning", 1),
        ("drawing", 16),
        ("captioning", 16),
    ]
    assert all(row["per_second"] > 0 for row in report["speed"])
    lines = (drawn / "runs/eval/emoji.jsonl").read_text().splitlines()
    assert len(lines) == 40
    assert {"name", "caption", "drawing_rank", "drawing_nearest"} < json.loads(lines[0]).keys()
    assert {json.loads(line)["split"] for line in lines} == {"trained", "held-out"}
    for name in ("emoji.png", "emoji-tokenizer.png"):
        with Image.open(drawn / "runs/eval" / name) as sheet:
            assert min(sheet.size) > 200
    printed = capsys.readouterr().out
    assert all(label in printed for label, _ in measures.MEASURES.values())
    assert "36 trained" in printed
    assert "4 held-out" in printed


@pytest.mark.slow
def test_held_out_numbers_depend_on_the_seed_and_not_on_the_limit(
    drawn: Path, tiny_checkpoint: Path
) -> None:
    def results(name: str, *, limit: int | None, seed: int, drawings: int = 1) -> dict[str, Any]:
        out = drawn / f"{name}.json"
        options = {**QUICK, "speed_repeats": 0, "device": "cpu", "drawings": drawings}
        main(str(tiny_checkpoint), out=out, limit=limit, seed=seed, **options)
        return json.loads(out.read_text())["results"]

    one, again, limited, other = (
        results("one", limit=None, seed=0),
        results("again", limit=None, seed=0),
        results("limited", limit=5, seed=0),
        results("other", limit=None, seed=1),
    )
    assert one == again
    assert limited["trained"]["count"] == 5
    assert limited["held-out"] == one["held-out"]
    assert other["held-out"] != one["held-out"]

    twice = results("twice", limit=None, seed=0, drawings=2)
    for split, found in twice.items():
        for key, mean in found["measures"].items():
            each = [once[split]["measures"][key]["value"] for once in (one, other)]
            expected = sum(each) / 2 if key.startswith("drawing") else each[0]
            assert mean["value"] == pytest.approx(expected, rel=1e-6), key


def test_shards_take_the_place_of_a_font(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    monkeypatch.setattr(benchmark, "find_font", lambda: pytest.fail("it asked for a font"))
    out = tmp_path / "emoji.json"
    main(str(tiny_checkpoint), shards=str(SAMPLES), out=out, **QUICK, device="cpu")
    report = json.loads(out.read_text())
    assert {name: found["count"] for name, found in report["results"].items()} == {"trained": 16}
    assert report["data"]["shards"] == str(SAMPLES)


def test_shards_give_the_emoji_that_were_written(tmp_path: Path) -> None:
    written = some_emoji()[:3]
    samples = [
        {
            "__key__": one.key,
            "png": png_bytes(one.image),
            "json": json.dumps({**vars(one), "image": None}).encode(),
        }
        for one in written
    ]
    write_shard(tmp_path / "0.tar", samples)
    gallery = Gallery.read(str(tmp_path))
    assert [one.name for one in gallery.emoji] == [one.name for one in written]
    assert torch.equal(gallery.levels, Gallery.of(written, {}).levels)
    assert [one.held_out for one in gallery.emoji] == [one.held_out for one in written]


# ---- what the user gets wrong


def refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run it as from a shell -> the one line that it answers with, at exit status 2."""
    monkeypatch.setattr(sys, "argv", ["eval.emoji.benchmark", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(main)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert "Traceback" not in line
    return line


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--stepps", "3"], "stepps"),
        (["--limit", "0"], "--limit 0 is too small; give 1 or more"),
        (["--limit", "few"], "few"),
        (["--seed", "-1"], "--seed -1"),
        (["--out", "result.txt"], "does not end in .json; try result.json"),
        (["--sheet", "sheet.jpg"], "does not end in .png"),
        (["--device", "abacus"], "--device abacus"),
        (["--model", "nowhere"], "nowhere"),
        (["--font", "a.ttf", "--shards", "b.tar"], "give one"),
        (["--drawings", "0"], "--drawings 0"),
        (["--steps", "0"], "num_inference_steps"),
        (["--guidance_scale", "nan"], "guidance_scale"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_sentence(
    arguments: list[str],
    says: str,
    drawn: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = [] if "--model" in arguments else ["--model", str(tiny_checkpoint)]
    assert says in refused([*model, *arguments], monkeypatch, capsys)


def test_an_unknown_key_in_a_file_is_one_sentence(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text("model: emoji\nguidance: 3\n")
    assert "guidance" in refused(["--config", "mine.yaml"], monkeypatch, capsys)


def test_without_a_font_it_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data_pipelines.sources.emoji.USUAL_FONTS", ())
    monkeypatch.setenv("PATH", "")  # no fc-list either
    monkeypatch.setattr(benchmark, "find_font", find_font)
    assert "apt-get install fonts-noto-color-emoji" in refused([], monkeypatch, capsys)


def test_shards_of_something_else_are_refused(
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shard(Path("texts.tar"), [{"__key__": "first", "json": b'{"text": "no emoji"}'}])
    Path("cut.tar").write_bytes(SAMPLES.read_bytes()[:5000])
    model = ["--model", str(tiny_checkpoint)]
    said = refused([*model, "--shards", "texts.tar"], monkeypatch, capsys)
    assert "sample first of texts.tar is no emoji" in said
    said = refused([*model, "--shards", "cut.tar"], monkeypatch, capsys)
    assert "shard cut.tar: " in said


def test_a_place_that_cannot_be_written_is_found_first(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "load", lambda *a, **b: pytest.fail("the slow work began"))
    Path("file").write_text("")
    assert "file/emoji.json" in refused(["--out", "file/emoji.json"], monkeypatch, capsys)
    Path("folder.json").mkdir()
    assert "is a folder" in refused(["--out", "folder.json"], monkeypatch, capsys)
