from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from data_pipelines.jobs.report import Report
from data_pipelines.sources.coco import coco_samples
from data_pipelines.sources.folder import folder_samples
from data_pipelines.sources.local_files import files_below


def put(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (number * 40, 0, 0)).save(path)


@pytest.fixture
def images(tmp_path):
    for number, name in enumerate(("a_red_dog.png", "deep/b.JPG", "c.webp")):
        put(tmp_path / "images" / name, number)
    folder = tmp_path / "images"
    (folder / "deep/b.txt").write_text(" a cat\n")
    (folder / "c.json").write_text('{"caption": "c"}')
    return folder


def test_folder(images):
    report = Report()
    a, c, b = folder_samples(images, report=report)
    assert a["txt"] == b"a red dog"  # its name
    assert a["png"] == (images / "a_red_dog.png").read_bytes()
    assert (b["txt"], b["jpg"]) == (b"a cat", (images / "deep/b.JPG").read_bytes())
    assert json.loads(c["json"]) == {"caption": "c"}
    assert "txt" not in c
    assert len({sample["__key__"] for sample in (a, b, c)}) == 3
    (named,) = report.changed
    assert (report.read, named.count, named.first) == (3, 1, [str(images / "a_red_dog.png")])


def test_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        list(folder_samples(tmp_path, report=Report()))
    with pytest.raises(ValueError, match="no such folder"):
        list(folder_samples(tmp_path / "x", report=Report()))


def test_captions_are_the_same_whichever_editor_saved_them(tmp_path):
    saved = [b"a red\nsquare", b"\xef\xbb\xbfa red\r\nsquare\r\n", "a red\nsquare".encode("utf-16")]
    for number, data in enumerate(saved):
        put(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_bytes(data)
    texts = [sample["txt"] for sample in folder_samples(tmp_path, report=Report())]
    assert texts == 3 * [b"a red\nsquare"]


@pytest.mark.parametrize("name, data", [("b.txt", b"caf\xe9"), ("b.json", b"[" * 200_000)])
def test_a_caption_that_cannot_be_read_is_named_and_counted(tmp_path, name, data):
    for image in ("a.png", "b.png", "c.png"):
        put(tmp_path / image)
    (tmp_path / name).write_bytes(data)
    report = Report(0.01)
    assert [s["txt"] for s in folder_samples(tmp_path, report=report)] == [b"a", b"c"]
    (broken,) = report.left_out
    assert (report.broken, broken.first) == (1, [str(tmp_path / "b.png")])
    assert name in broken.reason


def test_what_seems_to_be_meant_is_named(tmp_path):
    for name in ("a.png", "b.gif", "c.TIFF"):
        put(tmp_path / name)
    for name in ("a.txt", "d.txt", ".e.txt", "notes.md"):
        (tmp_path / name).write_text("a")
    (tmp_path / "linked").symlink_to(tmp_path / "gone")
    (tmp_path / "f.png").symlink_to(tmp_path / "gone.png")
    report = Report(0.01)
    assert len(list(folder_samples(tmp_path, report=report))) == 1
    formats, texts, links, broken = report.left_out
    assert links.first == [str(tmp_path / "linked")]
    assert (report.broken, broken.first) == (1, [str(tmp_path / "f.png")])
    assert (report.read, sum(cases.count for cases in report.left_out)) == (6, 5)
    assert formats.first == [str(tmp_path / "b.gif"), str(tmp_path / "c.TIFF")]
    assert (texts.reason, texts.first) == ("a text without its image", [str(tmp_path / "d.txt")])


class TestFiles:
    def test_hidden_ones_are_left_out_and_links_followed(self, tmp_path):
        put(tmp_path / "elsewhere/b.png")
        put(tmp_path / "photos/a.png")
        put(tmp_path / "photos/.ipynb_checkpoints/a-checkpoint.png")
        (tmp_path / "photos/._a.png").write_bytes(b"resource")
        (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
        names = [sample["txt"] for sample in folder_samples(tmp_path / "photos", report=Report())]
        assert names == [b"a", b"b"]

    def test_links_that_go_in_a_circle(self, tmp_path):
        put(tmp_path / "a/b/c.png")
        (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
        (tmp_path / "a/again").symlink_to(tmp_path / "a/b")
        (tmp_path / "a/self").symlink_to(tmp_path / "a/self")
        assert files_below(tmp_path, [".png"]) == [tmp_path / "a/b/c.png"]

    def test_no_file_that_would_hang(self, tmp_path):
        os.mkfifo(tmp_path / "a.png")
        with pytest.raises(ValueError, match="no images"):
            list(folder_samples(tmp_path, report=Report()))


class TestMetadata:
    def test_rows_name_images_and_texts(self, tmp_path):
        for name in ("0001.png", "deep/0002.png", "0003.png"):
            put(tmp_path / name)
        (tmp_path / "0001.txt").write_text("not this")
        rows = [
            {"file_name": "0001.png", "text": "a red dog", "n": 1},
            {"file_name": "deep/0002.png", "text": ["a cat", "a grey cat"]},
        ]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        report = Report()
        dog, cat = folder_samples(tmp_path, report=report)
        assert (dog["txt"], cat["txt"]) == (b"a red dog", b"a cat")
        assert dog["png"] == (tmp_path / "0001.png").read_bytes()
        assert [json.loads(one["json"]) for one in (dog, cat)] == rows
        (unnamed,) = report.left_out
        assert unnamed.first == [str(tmp_path / "0003.png")]
        assert report.read == 3

    def test_csv_and_another_column(self, tmp_path):
        put(tmp_path / "train/a.png")
        (tmp_path / "train/metadata.csv").write_text("file_name,words\na.png,hello\n")
        (one,) = folder_samples(tmp_path, report=Report(), text="words")
        assert one["txt"] == b"hello"
        with pytest.raises(ValueError, match="columns file_name, words: none of text, caption"):
            list(folder_samples(tmp_path, report=Report()))

    def test_rows_that_cannot_be_used_are_counted(self, tmp_path):
        put(tmp_path / "a.png")
        put(tmp_path.parent / "secret.png")
        (tmp_path / "link.png").symlink_to(tmp_path.parent / "secret.png")
        rows = [
            '{"file_name": "a.png", "text": "a"}',
            '{"file_name": "gone.png", "text": "b"}',
            '{"file_name": "../secret.png", "text": "c"}',
            json.dumps({"file_name": str(tmp_path.parent / "secret.png"), "text": "d"}),
            '{"file_name": "link.png", "text": "e"}',
            '{"file_name": 3, "text": "f"}',
            '{"file_name": "a.png", "text": 3}',
            '{"file_name": "a.png", "text": ""}',
            "{",
        ]
        (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
        report = Report(1.0)
        (good,) = folder_samples(tmp_path, report=report)
        assert good["txt"] == b"a"
        reasons = " ".join(map(str, report.left_out))
        for said in ("gone.png", "outside of the folder", "is no text but int", "no caption"):
            assert said in reasons
        assert (report.read, report.broken) == (10, 7)  # link.png is an image that no row may name
        allowed = list(folder_samples(tmp_path, report=Report(1.0), allow_outside=True))
        assert [one["txt"] for one in allowed] == [b"a", b"c", b"d", b"e"]

    def test_two_in_one_folder(self, tmp_path):
        put(tmp_path / "a.png")
        (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a\n")
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "b"}')
        with pytest.raises(ValueError, match=r"has both metadata.csv and metadata.jsonl"):
            list(folder_samples(tmp_path, report=Report()))


class TestClasses:
    def test_folders_are_labels_where_nothing_else_says_what_is_seen(self, tmp_path):
        for name in ("dog/1.png", "dog/2.png", "tabby_cat/1.png"):
            put(tmp_path / name)
        report = Report()
        samples = list(folder_samples(tmp_path, report=report))
        assert [one["txt"] for one in samples] == [b"dog", b"dog", b"tabby cat"]
        assert json.loads(samples[2]["json"]) == {"label": "tabby_cat", "file_name": "1.png"}
        assert "name of its folder" in str(report)

    @pytest.mark.parametrize("other", ["dog/1.txt", "top.png", "cat/deep/x.png"])
    def test_otherwise_they_are_not(self, tmp_path, other):
        for name in ("dog/1.png", "cat/two.png", *([other] if other.endswith("png") else [])):
            put(tmp_path / name)
        if other.endswith("txt"):
            (tmp_path / other).write_text("a dog")
        assert b"two" in [one["txt"] for one in folder_samples(tmp_path, report=Report())]


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(
        json.dumps(
            {
                "images": [
                    {"id": 7, "file_name": "deep/b.JPG"},
                    {"id": 3, "file_name": "c.webp"},
                ],
                "annotations": [
                    {"image_id": 3, "caption": " one \n"},
                    {"image_id": 7, "caption": "two"},
                    {"image_id": 3, "caption": "three"},
                ],
            }
        )
    )
    return path


def test_coco(captions, images):
    captions.write_bytes(b"\xef\xbb\xbf" + captions.read_bytes())
    b, c = coco_samples(captions, images, report=Report())
    assert (b["__key__"], b["txt"], "jpg" in b) == ("000000000007", b"two", True)
    assert c["txt"] == b"one"
    assert json.loads(c["json"])["captions"] == ["one", "three"]


@pytest.mark.parametrize("of_images, of_annotations", [(str, str), (str, int), (int, str)])
def test_coco_with_ids_that_are_texts(captions, images, of_images, of_annotations):
    content = json.loads(captions.read_text())
    for image in content["images"]:
        image["id"] = of_images(image["id"])
    for annotation in content["annotations"]:
        annotation["image_id"] = of_annotations(annotation["image_id"])
    captions.write_text(json.dumps(content))
    b, c = coco_samples(captions, images, report=Report())
    assert (b["txt"], c["txt"]) == (b"two", b"one")
    assert b["__key__"] != c["__key__"]


def test_coco_that_does_not_fit_in_places(captions, images, tmp_path):
    content = json.loads(captions.read_text())
    content["images"] += [
        {"id": 8, "file_name": "a_red_dog.png"},
        {"id": 9, "file_name": "gone.png"},
        {"id": 10, "file_name": "../captions.json"},
        {"id": 11, "file_name": "c.svg"},
    ]
    content["annotations"] += [{"image_id": n, "caption": "x"} for n in (9, 10, 11, 12)]
    content["annotations"].append({"image_id": 8, "caption": " "})
    captions.write_text(json.dumps(content))
    (images / "c.svg").write_text("<svg/>")
    report = Report(1.0)
    assert [one["txt"] for one in coco_samples(captions, images, report=report)] == [
        b"two",
        b"one",
    ]
    said = str(report)
    for reason in (
        "no caption (",
        "gone.png",
        "outside of the folder",
        "none of png, jpg",
        "not listed",
    ):
        assert reason in said
    assert (report.read, report.broken) == (7, 3)  # no caption is no damage


def test_other_files_than_coco(images, tmp_path):
    (tmp_path / "other.json").write_text('{"images": 3, "annotations": []}')
    (tmp_path / "deep.json").write_text("[" * 200_000)
    for name in ("other.json", "deep.json", "missing.json"):
        with pytest.raises(ValueError, match=name):
            list(coco_samples(tmp_path / name, images, report=Report()))
