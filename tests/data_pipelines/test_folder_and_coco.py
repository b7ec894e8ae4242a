from __future__ import annotations

import json

import pytest
from PIL import Image

from data_pipelines.coco import coco_samples
from data_pipelines.folder import folder_samples


@pytest.fixture
def pictures(tmp_path):
    for number, name in enumerate(("a_red_dog.png", "deep/b.JPG", "c.webp")):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number * 40, 0, 0)).save(path)
    folder = tmp_path / "pictures"
    (folder / "deep/b.txt").write_text(" a cat\n")
    (folder / "c.json").write_text('{"caption": "c"}')
    return folder


def test_folder(pictures):
    a, c, b = folder_samples(pictures)
    assert a["txt"] == b"a red dog"  # its name
    assert a["png"] == (pictures / "a_red_dog.png").read_bytes()
    assert (b["txt"], b["jpg"]) == (b"a cat", (pictures / "deep/b.JPG").read_bytes())
    assert json.loads(c["json"]) == {"caption": "c"}
    assert "txt" not in c
    assert len({sample["__key__"] for sample in (a, b, c)}) == 3


def test_folder_without_pictures(tmp_path):
    with pytest.raises(ValueError, match="no pictures"):
        list(folder_samples(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        list(folder_samples(tmp_path / "x"))


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


def test_coco(captions, pictures):
    b, c = coco_samples(captions, pictures)
    assert (b["__key__"], b["txt"], "jpg" in b) == ("000000000007", b"two", True)
    assert c["txt"] == b"one"
    assert json.loads(c["json"])["captions"] == ["one", "three"]


def test_coco_that_does_not_fit(captions, pictures, tmp_path):
    (pictures / "c.webp").unlink()
    with pytest.raises(ValueError, match=r"c\.webp, which is missing"):
        list(coco_samples(captions, pictures))
    (tmp_path / "other.json").write_text('{"images": 3, "annotations": []}')
    for name in ("other.json", "missing.json"):
        with pytest.raises(ValueError, match=name):
            list(coco_samples(tmp_path / name, pictures))
