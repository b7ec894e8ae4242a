"""Images of any kind become a set of squares: decoded once, split by content, and summed up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.shards.shards import read_json, read_shard
from data_pipelines.sources.image_set import (
    BLANK,
    HELD_OUT,
    ORIGIN,
    TRAIN,
    Summary,
    part_captions,
    some_pairs,
    split,
    spread,
)
from data_pipelines.sources.source import field_image, png_bytes
from data_pipelines.write_shards import folder

ROTATE = 0x0112  # EXIF: orientation
WHITE = (255, 255, 255)
CAPTIONS = (
    *("red dog", "ein roter Hund", "красная собака", "κόκκινο"),
    *("红色的狗", "赤い犬", "كلب أحمر", "🐕"),
)


def scaled(images: Path, out: Path, *, size: int = 16) -> list[dict]:
    folder(images, out / "scaled", size=size, max_broken=0.5)
    return [one for path in (out / "scaled").glob("*.tar") for one in read_shard(str(path))]


def write_colors(images: Path, count: int, *, start: int = 0) -> None:
    images.mkdir(exist_ok=True)
    for number in range(start, start + count):
        image = Image.new("RGB", (20, 20), (number % 256, number // 256, 99))
        image.save(images / f"color {number:04d}.png")


def test_every_format_becomes_an_upright_square_on_white(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    tall = Image.new("RGB", (20, 40), "red")
    tall.paste("blue", (0, 0, 20, 20))  # the upper half
    tall.save(images / "a.png")
    tall.save(images / "b.jpg", quality=95)
    tall.save(images / "c.webp", lossless=True)
    lying = tall.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ROTATE] = 6
    lying.save(images / "d.jpeg", exif=exif, quality=95)
    for sample in scaled(images, tmp_path):
        seen = field_image(sample)
        assert seen.size == (16, 16)
        assert seen.getpixel((1, 8)) == WHITE  # padded, left and right
        upper, lower = seen.getpixel((8, 3)), seen.getpixel((8, 12))
        assert upper[2] > 200 > upper[0]
        assert lower[0] > 200 > lower[2]
        origin = json.loads(sample[ORIGIN])
        assert (origin["width"], origin["height"], origin["transparent"]) == (20, 40, False)


def test_transparency_is_set_on_white_and_what_vanishes_is_left_out(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    icon = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    icon.paste((0, 0, 255, 255), (5, 5, 15, 15))
    icon.save(images / "blue.png")
    icon.paste((255, 255, 255, 255), (5, 5, 15, 15))
    icon.save(images / "white.png")
    Image.new("RGB", (20, 20), "white").save(images / "paper.png")  # it is meant
    found = {json.loads(one[ORIGIN])["file"]: one for one in scaled(images, tmp_path, size=20)}
    assert sorted(Path(name).name for name in found) == ["blue.png", "paper.png"]
    seen = field_image(found[str(images / "blue.png")])
    assert (seen.getpixel((0, 0)), seen.getpixel((10, 10))) == (WHITE, (0, 0, 255))
    (left_out,) = read_json(tmp_path / "scaled" / "index.json")["report"]["left_out"]
    assert left_out["reason"] == BLANK
    assert left_out["first"] == [str(images / "white.png")]


def test_broken_files_and_links_are_counted_by_name(tmp_path):
    images = tmp_path / "images"
    write_colors(images, 9)
    whole = png_bytes(Image.effect_noise((20, 20), 99))
    (images / "broken.png").write_bytes(whole[: len(whole) // 2])
    (images / "no image.jpg").write_text("hello")
    (images / "gone.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("RGB", (900, 2)).save(images / "line.png")
    (images / "alone.txt").write_text("a caption")
    assert len(scaled(images, tmp_path)) == 9
    report = read_json(tmp_path / "scaled" / "index.json")["report"]
    named = {Path(name).name for cases in report["left_out"] for name in cases["first"]}
    assert named == {"broken.png", "no image.jpg", "gone.png", "line.png", "alone.txt"}
    assert report["broken"] == 4


def test_captions_in_any_script(tmp_path):
    images = tmp_path / "images"
    write_colors(images, len(CAPTIONS))
    for path, caption in zip(sorted(images.glob("*.png")), CAPTIONS, strict=True):
        path.with_suffix(".txt").write_text(f" {caption}\n", encoding="utf-8")
    scaled(images, tmp_path)
    summary = split(tmp_path / "scaled", tmp_path / "set")
    both = [c for part in (TRAIN, HELD_OUT) for c in part_captions(tmp_path / "set" / part)]
    assert sorted(both) == sorted(CAPTIONS)
    assert summary.captions == len(CAPTIONS)
    assert CAPTIONS[2] in str(summary)


def test_the_split_follows_from_the_content(tmp_path):
    images = tmp_path / "images"
    write_colors(images, 200)
    scaled(images, tmp_path / "one")
    first = split(tmp_path / "one" / "scaled", tmp_path / "one" / "set", share=0.1)
    held = set(part_captions(tmp_path / "one" / "set" / HELD_OUT))
    assert 8 <= len(held) <= 35
    assert first.train + first.held_out == 200
    # Others join, and one changes its name: it stays on its side.
    write_colors(images, 100, start=200)
    moved = sorted(held)[0]
    (images / f"{moved}.png").rename(images / "another name.png")
    scaled(images, tmp_path / "two")
    split(tmp_path / "two" / "scaled", tmp_path / "two" / "set", share=0.1)
    again = set(part_captions(tmp_path / "two" / "set" / HELD_OUT))
    assert (held - {moved}) | {"another name"} <= again
    assert again.isdisjoint(part_captions(tmp_path / "two" / "set" / TRAIN))


def test_copies_stay_together_and_some_image_is_held_out(tmp_path):
    images = tmp_path / "images"
    write_colors(images, 9)
    for path in sorted(images.glob("*.png")):
        (images / f"copy of {path.name}").write_bytes(path.read_bytes())
    scaled(images, tmp_path)
    summary = split(tmp_path / "scaled", tmp_path / "set", share=1e-9)
    assert summary.copies == 9
    assert summary.held_out == 2
    one, other = sorted(part_captions(tmp_path / "set" / HELD_OUT))
    assert other == f"copy of {one}"


def test_captions_that_many_images_share_weigh_less(tmp_path):
    images = tmp_path / "images"
    write_colors(images, 12)
    for number, path in enumerate(sorted(images.glob("*.png"))):
        path.with_suffix(".txt").write_text("often" if number < 8 else f"once {number}")
    scaled(images, tmp_path)
    split(tmp_path / "scaled", tmp_path / "set", share=1e-9)
    weights = {}
    for sample in read_shard(str(tmp_path / "set" / TRAIN / "000000.tar")):
        about = json.loads(sample["json"])
        weights.setdefault(about["captions"][0], set()).add(about["sampling_weight"])
        assert Path(about["file"]).parent == images
    often = len([c for c in part_captions(tmp_path / "set" / TRAIN) if c == "often"])
    assert weights.pop("often") == {math.sqrt(1 / often)}
    assert all(weight == {1.0} for weight in weights.values())


def test_all_captions_of_an_image_are_kept(tmp_path):
    images = tmp_path / "images"
    write_colors(images, 8)
    for path in sorted(images.glob("*.png")):
        notes = {"captions": [f"{path.stem} a", f"{path.stem}  b"]}
        path.with_suffix(".json").write_text(json.dumps(notes))
    scaled(images, tmp_path)
    assert split(tmp_path / "scaled", tmp_path / "set").captions == 16
    for sample in read_shard(str(tmp_path / "set" / TRAIN / "000000.tar")):
        first, second = json.loads(sample["json"])["captions"]
        assert sample["txt"].decode() == first
        assert second == first.replace(" a", " b")


@pytest.mark.parametrize("count, alike, said", [(7, False, "only 7 images"), (9, True, "the same")])
def test_what_is_no_set(tmp_path, count, alike, said):
    images = tmp_path / "images"
    write_colors(images, count)
    for path in images.glob("*.png"):
        path.with_suffix(".txt").write_text("alike" if alike else path.stem)
    scaled(images, tmp_path)
    with pytest.raises(ValueError, match=said):
        split(tmp_path / "scaled", tmp_path / "set")
    assert not (tmp_path / "set" / "index.json").exists()


def test_an_image_without_a_caption_is_left_out(tmp_path):
    images = tmp_path / "images"
    write_colors(images, 9)
    first, second, *_ = sorted(images.glob("*.png"))
    first.with_suffix(".txt").write_text(" \n")
    second.with_suffix(".json").write_text('{"camera": "none"}')
    scaled(images, tmp_path)
    with pytest.raises(ValueError, match="only 7 images"):
        split(tmp_path / "scaled", tmp_path / "set")
    write_colors(images, 2, start=9)
    scaled(images, tmp_path / "more")
    summary = split(tmp_path / "more" / "scaled", tmp_path / "more" / "set")
    assert summary.images == 9
    assert first.name in str(summary)
    assert second.name in str(summary)


def test_a_set_is_written_once_and_read_back(tmp_path):
    images = tmp_path / "images"
    write_colors(images, 10)
    scaled(images, tmp_path)
    summary = split(tmp_path / "scaled", tmp_path / "set")
    assert Summary.read(tmp_path / "set") == summary
    assert split(tmp_path / "scaled", tmp_path / "set") == summary
    pairs = some_pairs(tmp_path / "set" / TRAIN, 3)
    assert len(pairs) == 3
    assert pairs[0].image.size == (16, 16)
    with pytest.raises(ValueError, match="other settings"):
        split(tmp_path / "scaled", tmp_path / "set", share=0.4)


def test_spread():
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread(range(2), 3) == [0, 1]
    assert spread([], 3) == []
