"""The demonstration: a page that is whole, works alone and says what is shown."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.sources.emoji import Emoji, draw_emoji, find_font
from eval import demo
from eval.demo_page import Completion, Origin, page

ROOT = Path(__file__).parents[2]


class Reader(HTMLParser):
    """Collects the addresses and the attributes of a page, and sees that its tags are closed."""

    VOID = ("meta", "img", "source", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.classes: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "img":
            self.images.append(given)
        self.addresses += [given[k] or "" for k in ("src", "srcset", "href") if k in given]
        self.classes += (given.get("class") or "").split()
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def shown(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a model with random weights."""
    out = tmp_path_factory.mktemp("demo") / "new" / "demo"
    demo.main(out, model=str(tiny_checkpoint), seed=3)
    return out


@pytest.mark.slow
def test_the_page_is_whole_and_works_alone(shown: Path) -> None:
    text = (shown / "index.html").read_text()
    reader = Reader(text)
    assert reader.addresses
    for address in reader.addresses:
        assert (shown / address).is_file(), address
    assert "http" not in text
    assert "script" not in text
    assert "prefers-color-scheme: dark" in text
    for image in reader.images:
        assert image["alt"]
    assert not list(shown.rglob("*.part"))


def test_it_shows_what_it_promises(shown: Path) -> None:
    reader = Reader((shown / "index.html").read_text())
    words = " ".join(reader.text)
    drawn = [one for one in reader.images if (one["alt"] or "").startswith("drawn: ")]
    assert len(drawn) == len(demo.PROMPTS) + len(demo.INVENTED)
    for prompt in (*demo.PROMPTS, *demo.INVENTED):
        assert prompt in words
    for origin in Origin:
        assert reader.classes.count(origin.name.lower()) >= 3
    assert "its name: locomotive" in words
    assert "the hole" in words
    assert "[MASK] heart" in words
    with Image.open(shown / "images" / "denoising.gif") as animation:
        assert animation.n_frames == 12
        assert animation.size == (6 * (2 * 16 + 8) + 8, 2 * (2 * 16 + 8) + 8)
    with Image.open(shown / "images" / "sheet.png") as sheet:
        assert sheet.size == (6 * (2 * 16 + 8) + 8, 4 * (2 * 16 + 8) + 8)


def test_a_hole_changes_only_the_hole(shown: Path) -> None:
    for n, hole in enumerate(demo.HOLES, start=1):
        before, after = (
            np.array(Image.open(shown / "images" / f"mending-{n}-{which}.png"))
            for which in ("before", "after")
        )
        mask = np.array(demo.outline_mask(hole.outline, before.shape[1::-1])) > 0
        assert mask.any()
        assert not mask.all()
        assert (before[~mask] == after[~mask]).all()


def test_prompts_are_of_all_three_kinds_and_names_exist() -> None:
    kinds = [demo.origin_of(prompt) for prompt in demo.PROMPTS]
    assert len(set(demo.PROMPTS)) == len(kinds) == 24
    assert kinds.count(Origin.TRAINED) == 15
    assert kinds.count(Origin.HELD_OUT) == 9
    assert {demo.origin_of(prompt) for prompt in demo.INVENTED} == {Origin.NEW}
    assert Origin.NEW not in {demo.origin_of(name) for name in demo.DESCRIBED}
    assert [demo.origin_of(name) for name in demo.DESCRIBED].count(Origin.HELD_OUT) == 4


def test_every_real_image_lies_beside_the_demonstration() -> None:
    real = demo.real_images()
    assert len(real) == 12
    assert all(image.size == (64, 64) for image in real.values())
    assert len({image.tobytes() for image in real.values()}) == 12
    shown = {hole.name for hole in demo.HOLES} | {gap.image for gap in demo.GAPS} - {None}
    assert shown <= real.keys()


@pytest.mark.slow
@pytest.mark.font
def test_real_images_are_those_of_the_font() -> None:
    drawn = draw_emoji(find_font())
    real = demo.real_images()
    font = {one.name: one.image for one in drawn if isinstance(one, Emoji) and one.name in real}
    assert font.keys() == real.keys()
    for name, image in real.items():
        difference = np.asarray(image).astype(int) - np.asarray(font[name])
        assert np.abs(difference).mean() < 8, name  # another version of the font may be installed


def test_what_a_model_says_cannot_break_the_page(shown: Path) -> None:
    evil = '<script>"&'
    content = demo.Content(
        model=evil,
        seed=0,
        seconds=1.0,
        steps=4,
        animation=demo.Animation("a.gif", "a.png", (evil,), 8, 8),
        drawings=[demo.Drawing(evil, Origin.NEW, "a.png", "b.png")],
        answers=[demo.Answer("name", Origin.TRAINED, evil, "a.png")],
        mendings=[demo.Mending(evil, evil, "a.png", "b.png", "c.png")],
        completions=[Completion(evil, evil, evil, 1, "a.png", evil)],
        invented=[demo.Drawing(evil, Origin.NEW, "a.png", None)],
    )
    text = page(content)
    assert "<script" not in text
    assert evil in "".join(Reader(text).text)


@pytest.mark.parametrize(
    "options, says",
    [
        (["--model", "missing"], "no model 'missing'"),
        (["--model", "MODEL", "--out", "taken/demo"], "taken"),
        (["--sede", "1"], "--sede"),
        (["--seed", "one"], "seed"),
    ],
)
def test_bad_input_is_one_sentence(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file, no folder")
    given = [str(tiny_checkpoint) if option == "MODEL" else option for option in options]
    monkeypatch.setattr(sys, "argv", ["demo", *given])
    with pytest.raises(SystemExit) as caught:
        demo.command_line.run(demo.main)
    assert caught.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in last
    assert not Path("demo", "index.html").exists()


@pytest.mark.slow
def test_help_from_a_shell() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "eval.demo", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert all(option in shown.stdout for option in ("--out", "--model", "--seed"))
