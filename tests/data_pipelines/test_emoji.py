from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_pipelines.sources import emoji as emoji_source
from data_pipelines.sources.emoji import (
    Emoji,
    LeftOut,
    alike_names,
    draw_emoji,
    find_font,
    fully_qualified,
    is_held_out,
    sampling_weights,
)
from data_pipelines.sources.emoji_facts import without_skin_tones

FIREFIGHTER = "\U0001f469\U0001f3fe\u200d\U0001f692"
UNKNOWN_PAIR = "\U0001f469\u200d\U0001f9a7"  # no font joins a woman and an orangutan


def test_what_is_held_out_has_a_skin_tone():
    held_out = [c for c in fully_qualified() if is_held_out(c)]
    toned = [c for c in fully_qualified() if any("\U0001f3fb" <= x <= "\U0001f3ff" for x in c)]
    assert set(held_out) < set(toned)
    assert 0.07 < len(held_out) / len(toned) < 0.13


def test_held_out_is_fixed():
    import hashlib

    for characters in (FIREFIGHTER, "\U0001f44d\U0001f3fb", "\U0001f600"):
        rest = int(hashlib.sha256(characters.encode()).hexdigest(), 16) % 10
        assert is_held_out(characters) == (rest == 0 and characters != "\U0001f600")


def test_alike():
    def one(name, color):
        return Emoji(name, {}, (), name, Image.new("RGB", (2, 2), color), False)

    assert alike_names([one("a", "red"), one("b", "blue"), one("c", "red")]) == {
        "a": {"a", "c"},
        "b": {"b"},
        "c": {"a", "c"},
    }


def test_a_person_in_all_skin_tones_weighs_as_much_as_a_thing():
    def one(name, characters):
        return Emoji(name, {}, (), characters, Image.new("RGB", (2, 2)), False)

    light, dark = "\U0001f44d\U0001f3fb", "\U0001f44d\U0001f3ff"
    emoji = [
        one("rocket", "\U0001f680"),
        one("thumbs up", "\U0001f44d"),
        one("thumbs up light skin tone", light),
        one("thumbs up dark skin tone", dark),
        one("kiss man man light skin tone medium-dark skin tone", light + dark),
    ]
    assert list(sampling_weights(emoji).values()) == [1, 1, 0.5, 0.5, 1]


def test_without_skin_tones():
    name = "people holding hands medium-light skin tone medium skin tone"
    assert without_skin_tones(name) == "people holding hands"
    assert without_skin_tones("dark skin tone") == ""
    assert without_skin_tones("light bulb") == "light bulb"


@pytest.fixture
def font():
    return find_font()


@pytest.fixture
def drawn(font, monkeypatch):
    """Some emoji, drawn."""
    some = ["\U0001f600", FIREFIGHTER, "\U0001f1e9\U0001f1ea"]
    monkeypatch.setattr(emoji_source, "fully_qualified", lambda: some)
    return list(draw_emoji(font, size=32))


@pytest.mark.font
def test_images_and_names(drawn):
    assert all(isinstance(one, Emoji) for one in drawn)
    face, firefighter, flag = drawn
    assert firefighter.name == "woman firefighter medium-dark skin tone"
    assert firefighter.code_points == (0x1F469, 0x1F3FE, 0x200D, 0x1F692)
    assert firefighter.key == "1f469-1f3fe-200d-1f692"
    assert face.names["en"] == "grinning face"
    assert face.names["de"] == "grinsendes gesicht"
    assert len(face.names) >= 14
    assert "grinning" in face.aliases
    assert flag.name == "Germany"
    for one in drawn:
        pixels = np.asarray(one.image)
        assert pixels.shape == (32, 32, 3)
        assert (pixels[0, 0] > 250).all(), "white at the corner"
        assert pixels.std() > 20, "something is drawn"
        rows, columns = np.nonzero((pixels < 240).any(-1))
        assert abs(rows.mean() - 15.5) < 5
        assert abs(columns.mean() - 15.5) < 5


@pytest.mark.font
def test_what_the_font_does_not_know_is_left_out(font, monkeypatch):
    pair, blank = UNKNOWN_PAIR, emoji_source.UNASSIGNED
    entry = {"en": ":a_b:", "status": 2}
    data = {pair: entry, blank: entry}
    monkeypatch.setattr(emoji_source.emoji_package, "EMOJI_DATA", data)
    monkeypatch.setattr(emoji_source.emoji_package.config, "load_language", lambda: None)
    left_out = list(draw_emoji(font))
    assert all(isinstance(one, LeftOut) for one in left_out)
    assert [one.reason for one in left_out] == ["drawn as 2 glyphs", "not in the font"]


def test_no_font(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji_source, "USUAL_FONTS", (str(tmp_path / "none.ttf"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apt-get install fonts-noto-color-emoji"):
        find_font()


def test_a_file_that_is_no_font(tmp_path):
    (tmp_path / "x.ttf").write_bytes(b"no font")
    for name in ("x.ttf", "missing.ttf"):
        with pytest.raises(ValueError, match=name):
            list(draw_emoji(tmp_path / name))


@pytest.mark.font
def test_pillow_without_raqm(font, monkeypatch):
    monkeypatch.setattr(emoji_source.features, "check", lambda name: False)
    with pytest.raises(ValueError, match="RAQM"):
        list(draw_emoji(font))
