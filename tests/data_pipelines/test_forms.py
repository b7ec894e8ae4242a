"""The forms in which people have data, from the file that its maker writes to samples of shards."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from data_pipelines import write_shards as jobs
from data_pipelines.shards.shards import INDEX, Sample, expand_urls, read_json, read_shard
from data_pipelines.sources import mds, rows
from data_pipelines.sources.interleaved import Interleaved
from data_pipelines.sources.row_files import rows_in
from data_pipelines.sources.rows import rows_of
from data_pipelines.sources.source import encode_array
from mmdlm.core.vocabulary import Modality, Vocabulary

pytest.importorskip("datasets", reason="datasets is not installed")
from tests.data_pipelines import forms
from tests.data_pipelines.forms import CAPTIONS, COLORS, FORMS, LINES, jpeg

FETCHED = [CAPTIONS[0], CAPTIONS[2], CAPTIONS[1]]  # in the order in which img2dataset was asked

Make = Callable[[Path], Path]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., list[Sample]]:
    """write(job, form) -> the samples that a job writes of a form; its report in `write.report`."""

    def written(job: Callable[..., None], make: Make, name: str = "source", **options: Any) -> Any:
        folder = tmp_path / "given"
        folder.mkdir(exist_ok=True)
        given = make(folder)
        options = {key: one(folder) if callable(one) else one for key, one in options.items()}
        out = tmp_path / "out"
        job(**{name: str(given) if name == "source" else given}, out=out, **options)
        written.report = read_json(out / INDEX)["report"]  # type: ignore[attr-defined]
        return [
            {**one, **({"json": json.loads(one["json"])} if "json" in one else {})}
            for url in expand_urls(out)
            for one in read_shard(url)
        ]

    return written


def beside(folder: Path) -> Path:
    return folder


def said(sample: Sample) -> list[tuple[str, str]]:
    return [(one["role"], one["content"]) for one in sample["json"]["messages"]]


class TestImagesWithCaptions:
    @pytest.mark.parametrize("make", [forms.imagefolder, forms.imagefolder_parquet])
    def test_imagefolder(self, write, make):
        samples = write(jobs.folder, make, "images")
        assert [one["txt"].decode() for one in samples] == CAPTIONS
        assert [one["jpg"] for one in samples] == [jpeg(color) for color in COLORS]

    def test_class_folders_are_read_by_split(self, write):
        with pytest.raises(ValueError, match=r"has test, train, and none is named; .* --split all"):
            write(jobs.folder, forms.class_folders, "images")
        with pytest.raises(ValueError, match="but not 'dev'"):
            write(jobs.folder, beside, "images", split="dev")
        samples = write(jobs.folder, beside, "images", split="train")
        assert [one["txt"] for one in samples] == [b"green things", b"red things"]

    def test_all_splits_of_class_folders(self, write):
        assert len(write(jobs.folder, forms.class_folders, "images", split="all")) == 5

    def test_coco(self, write):
        samples = write(jobs.coco, forms.coco, "captions", images=beside)
        assert samples[0]["json"]["captions"] == ["a red field", "a red field."]
        assert [one["jpg"] for one in samples] == [jpeg(color) for color in COLORS]

    @pytest.mark.parametrize(
        "make", [forms.parquet, forms.hub_folder, forms.saved, forms.saved_splits]
    )
    def test_images_in_columns(self, write, make):
        samples = write(jobs.dataset, make)
        assert [one["txt"].decode() for one in samples] == CAPTIONS
        assert [one["jpg"] for one in samples] == [jpeg(color) for color in COLORS]
        assert samples[1]["json"] == {"caption": CAPTIONS[1], "label": "cold"}

    @pytest.mark.parametrize("make", [forms.hub_folder, forms.saved_splits])
    def test_splits_that_lie_here(self, write, make, capsys):
        (sample,) = write(jobs.dataset, make, split="test", text="{label}: {caption}")
        assert sample["txt"] == b"warm: a red field"
        if make is forms.hub_folder:
            assert "only its split test is read, not train" in capsys.readouterr().out

    @pytest.mark.parametrize("make", [forms.hub_folder, forms.saved_splits])
    def test_a_split_that_is_not_there(self, tmp_path, make):
        with pytest.raises(ValueError, match="has the splits test, train, but not 'dev'"):
            list(rows_of(str(make(tmp_path)), split="dev"))

    @pytest.mark.parametrize("packing", ["plain", "zstd", "gz"])
    def test_mds(self, write, packing):
        samples = write(jobs.dataset, forms.mds(packing))
        assert [one["txt"].decode() for one in samples] == CAPTIONS
        assert all(one["jpg"].startswith(b"\xff\xd8") for one in samples)
        assert len({one["jpg"] for one in samples}) == 3
        assert samples[2]["json"] == {
            "caption": CAPTIONS[2],
            "id": 2,
            "meta": {"tags": ["blue"]},
            "score": 1.0,
            "n": 7,
        }
        assert write.report["unused"] == {"raw": 3}

    def test_what_img2dataset_has_fetched(self, write):
        samples = write(jobs.dataset, forms.img2dataset("parquet"))
        assert [one["txt"] for one in samples] == [
            b"a red field",
            b"a blue field",
            b"a green field",
        ]
        (left_out,) = write.report["left_out"]
        assert (left_out["count"], left_out["reason"]) == (1, "no image: its 'jpg' is empty")

    def test_files_of_img2dataset(self, write):
        samples = write(jobs.folder, forms.img2dataset("files"), "images")
        assert [one["txt"] for one in samples] == [
            b"a red field",
            b"a blue field",
            b"a green field",
        ]
        assert samples[0]["json"]["url"].endswith("red.jpg")

    def test_shards_of_img2dataset_are_read_as_they_are(self):
        urls = expand_urls(FORMS / "img2dataset_webdataset")
        samples = [one for url in urls for one in read_shard(url)]
        assert [one["txt"] for one in samples] == [
            b"a red field",
            b"a blue field",
            b"a green field",
        ]
        assert all(one["jpg"].startswith(b"\xff\xd8") for one in samples)

    @pytest.mark.parametrize(
        "options, says",
        [
            ({"image": "img"}, "has the columns image, caption, label: no 'img'"),
            ({"text": "title"}, "no 'title'; name the one with the captions with --text"),
            ({"text": "{title}"}, "no '{title}'"),
            ({"size": 0}, "size is 0"),
        ],
    )
    def test_columns_that_are_not_there(self, write, options, says):
        with pytest.raises(ValueError, match=says):
            write(jobs.dataset, forms.parquet, **options)

    def test_images_of_the_hub_that_lie_beside_their_rows(self, tmp_path, monkeypatch):
        """Streamed rows name files of the repository, which are fetched; other paths are not."""
        import datasets
        import fsspec
        from fsspec.implementations.memory import MemoryFileSystem

        class Hub(MemoryFileSystem):
            protocol = "hf"
            store: ClassVar[dict[str, Any]] = {}

        fsspec.register_implementation("hf", Hub, clobber=True)
        inside, outside = "hf://datasets/a/b@main/red.jpg", "hf://datasets/c/d@main/red.jpg"
        for path in (inside, outside):
            with fsspec.open(path, "wb") as file:
                file.write(jpeg("red"))
        images = [{"bytes": None, "path": path} for path in (inside, outside)]
        rows = {"image": images, "text": ["a", "b"]}
        features = {"image": datasets.Image(), "text": datasets.Value("string")}
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table.to_iterable_dataset())
        monkeypatch.chdir(tmp_path)
        first, second = rows_of("a/b")
        assert first.values["image"]["bytes"] == jpeg("red")
        assert second.values["image"]["bytes"] is None


class TestTexts:
    @pytest.mark.parametrize("make", [forms.jsonl_gz, forms.json_gz, forms.jsonl_zst])
    def test_compressed_lines(self, write, make):
        assert [one["json"] for one in write(jobs.text, make)] == LINES

    def test_mds(self, write):
        samples = write(jobs.text, forms.mds("text"))
        assert [one["json"] for one in samples] == [
            {"text": "hello", "s": 12},
            {"text": "wörld", "s": -5},
        ]
        assert write.report["unused"] == {"tokens": 2, "img": 2, "pil": 2}

    @pytest.mark.parametrize("make", [forms.jsonl_gz, forms.jsonl_zst])
    def test_a_file_that_is_cut_short(self, tmp_path, make):
        path = make(tmp_path)
        path.write_bytes(path.read_bytes()[:-6])
        with pytest.raises(ValueError, match=f"{path.name} ends too early; fetch it again"):
            list(rows_in(path))

    def test_a_file_that_is_not_compressed(self, tmp_path):
        (tmp_path / "a.jsonl.gz").write_text("{}")
        with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be read \(Not a gzipped file"):
            list(rows_in(tmp_path / "a.jsonl.gz"))

    def test_csv_and_lists_are_compressed_too(self, tmp_path):
        (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text\nhello\n"))
        (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'[{"text": "hello"}]'))
        found = [
            row.values for name in ("a.csv.gz", "a.json.gz") for row in rows_in(tmp_path / name)
        ]
        assert found == 2 * [{"text": "hello"}]

    @pytest.mark.parametrize(
        "damage, says",
        [
            (lambda shard, index: shard.write_bytes(shard.read_bytes()[:-1]), "bytes, not"),
            (
                lambda shard, index: shard.write_bytes(bytes(628)),
                "does not fit",
            ),
            (lambda shard, index: shard.unlink(), "which is not there"),
            (
                lambda shard, index: index.write_text(index.read_text().replace("samples", "x")),
                "index.json is damaged",
            ),
        ],
    )
    def test_damaged_mds(self, tmp_path, damage, says):
        for path in (FORMS / "mds/text").iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        damage(tmp_path / "shard.00000.mds", tmp_path / "index.json")
        with pytest.raises(ValueError, match=says):
            list(rows_of(str(tmp_path)))

    @pytest.mark.parametrize(
        "encoding, data",
        [
            ("list[str]", np.array([7, 5, 5], "<u4").tobytes() + b"helloworld12"),
            ("list[str]", np.array([2, 5, 5], "<u4").tobytes() + b"helloworld12"),
            ("pil", np.array([20_000, 20_000, 3], "<u4").tobytes() + b"RGB"),
            ("pil", np.array([1, 1, 4], "<u4").tobytes() + b"what"),
        ],
    )
    def test_values_of_mds_that_do_not_fit(self, encoding, data):
        with pytest.raises(ValueError, match=r"does not fit|no RGB image|mode 'what'"):
            mds._decoded(encoding, data)

    def test_two_shards_of_one_name(self, tmp_path):
        for folder in ("0", "1"):
            (tmp_path / folder).mkdir()
            for path in (FORMS / "mds/text").iterdir():
                (tmp_path / folder / path.name).write_bytes(path.read_bytes())
        index = json.loads((tmp_path / "0/index.json").read_text())
        (shard,) = index["shards"]
        parts = ("raw_data", "zip_data")
        index["shards"] = [
            {
                **shard,
                **{
                    part: {**shard[part], "basename": f"{folder}/{shard[part]['basename']}"}
                    for part in parts
                    if shard.get(part)
                },
            }
            for folder in ("0", "1")
        ]
        (tmp_path / "index.json").write_text(json.dumps(index))
        assert len(list(rows_of(str(tmp_path)))) == 2 * shard["samples"]

    @pytest.mark.parametrize("path", ["/etc/hostname::", "file:///etc/hostname::", ""])
    def test_rows_of_the_hub_name_only_their_own_files(self, path):
        value = {"bytes": None, "path": f"{path}hf://datasets/other/set@main/x"}
        assert rows._fetched(value, "other/sets") is value
        value = {"bytes": None, "path": "/etc/hostname::hf://datasets/o/set@main/x"}
        assert rows._fetched(value, "o/set") is value


class TestConversations:
    def test_llava(self, write):
        first, second = write(jobs.conversations, forms.llava, images=beside)
        assert said(first)[0] == ("user", "<image>\nWhat color is it?")
        assert (first["jpg"], "jpg" in second) == (jpeg("red"), False)

    def test_sharegpt(self, write):
        _, cut, bing = write(jobs.conversations, forms.sharegpt)
        assert said(cut) == [("user", "Go on"), ("assistant", "The end.")]
        assert said(bing)[1] == ("assistant", "Hello, this is Bing.")
        assert [one["reason"] for one in write.report["changed"]] == [
            "it begins with an answer, which is left out",
            "1 messages behind its last answer are left out",
        ]

    def test_openai(self, write):
        seen, kind = write(jobs.conversations, forms.openai)
        assert said(seen)[1] == ("user", "What is this?<image>")
        assert seen["jpg"] == jpeg("red")
        assert seen["json"]["messages"][2]["weight"] == 0
        assert said(kind) == [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hello!")]

    @pytest.mark.parametrize("make", [forms.trl_vision, forms.trl_vision_plain])
    def test_trl(self, write, make):
        (sample,) = write(jobs.conversations, make)
        assert said(sample) == [("user", "<image>What is it?"), ("assistant", "Red.")]
        assert sample["jpg"] == jpeg("red")
        assert write.report["unused"] == {}

    @pytest.mark.parametrize("make", [forms.openai_tools, forms.sharegpt_tools])
    def test_tools_are_text(self, write, make):
        (sample,) = write(jobs.conversations, make)
        (_, system), _, (caller, call), (giver, result), (_, answer) = said(sample)
        assert '"name": "weather"' in system.partition("<tools>")[2].partition("</tools>")[0]
        called = [one.split("</tool_call>")[0] for one in call.split("<tool_call>")[1:]]
        assert (caller, giver) == ("assistant", "user")
        if make is forms.openai_tools:
            cities = [json.loads(one)["arguments"]["city"] for one in called]
            assert cities == ["Rome", "Oslo"]
            assert result == (
                "<tool_response>\nclear\n</tool_response>\n<tool_response>\nsnow\n</tool_response>"
            )
        else:
            assert system.startswith("Be brief.")
            assert json.loads(called[0]) == {"name": "weather", "arguments": {"q": 1}}
        assert answer in ("Rome.", "Clear.")
        (changed,) = write.report["changed"]
        assert changed["reason"] == "its tools, their calls and results are written as text"

    def test_preferences_of_openai(self, write):
        (sample,) = write(jobs.preferences, forms.openai_preferences)
        sides = {name: [one["content"] for one in part] for name, part in sample["json"].items()}
        assert sides == {"prompt": ["Hello"], "chosen": ["Hello!"], "rejected": ["What?"]}


class TestInterleaved:
    @pytest.mark.parametrize("fetched", ["webdataset", "files"])
    def test_obelics(self, write, fetched):
        (sample,) = write(jobs.interleaved, forms.obelics, images=FORMS / f"img2dataset_{fetched}")
        kinds = [one.get("text", "image") for one in sample["json"]["content"]]
        assert kinds == ["image", "First.\n\nStill first.", "Second.", "image"]
        assert sorted(name for name in sample if name.endswith("jpg")) == ["0.jpg", "1.jpg"]
        (changed,), (left_out,) = write.report["changed"], write.report["left_out"]
        assert (changed["count"], left_out["count"]) == (2, 1)
        assert left_out["reason"] == "none of its images is here"

    def test_mmc4(self, write):
        (sample,) = write(jobs.interleaved, forms.mmc4, images=FORMS / "img2dataset_files")
        kinds = [one.get("text", "image") for one in sample["json"]["content"]]
        assert kinds == ["image", "First.", "Second.", "image", "Third."]

    def test_marks_in_a_text(self, write):
        def make(folder: Path) -> Path:
            for color in COLORS:
                (folder / f"{color}.jpg").write_bytes(jpeg(color))
            rows = [{"text": "a<image>b<image>", "images": ["red.jpg", "blue.jpg"]}]
            (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
            return folder / "a.jsonl"

        (sample,) = write(jobs.interleaved, make, images=beside)
        kinds = [one.get("text", "image") for one in sample["json"]["content"]]
        assert kinds == ["a", "image", "b", "image"]
        assert (sample["0.jpg"], sample["1.jpg"]) == (jpeg("red"), jpeg("blue"))

    def test_another_form(self, write):
        with pytest.raises(ValueError, match="has the columns text, n, but not texts with images"):
            write(jobs.interleaved, forms.jsonl_gz)


class TestInterleavedSequences:
    @pytest.fixture
    def sample(self) -> Sample:
        content = [
            {"type": "text", "text": "1 2"},
            {"type": "image"},
            {"type": "text", "text": "3"},
            {"type": "text", "text": "4 5"},
        ]
        return {
            "__key__": "a",
            "codes.npy": encode_array(torch.arange(4).numpy()),
            "json": json.dumps({"content": content}).encode(),
        }

    def laid_out(self, sample, vocabulary, tokenizer, seed=0, **options):
        return Interleaved(**{"separator": " ", **options}).sequence(
            sample,
            [],
            vocabulary,
            tokenizer=tokenizer,
            generator=torch.Generator().manual_seed(seed),
        )

    def test_reading_order_and_targets(self, sample, vocabulary: Vocabulary, tokenizer):
        whole = self.laid_out(sample, vocabulary, tokenizer, max_tokens=12)
        kinds = [one.modality for one in whole.segments]
        text, image, mark = Modality.TEXT, Modality.IMAGE, Modality.CONTROL
        assert kinds == [text, mark, image, mark, text, text, text]
        texts = [one.ids.tolist() for one in whole.segments if one.modality == text]
        assert texts == [[1, 2], [3], [4, 5], [vocabulary.eos_id]]
        assert [int(one.target.sum()) for one in whole.segments] == [2, 0, 4, 0, 1, 2, 1]
        only = self.laid_out(sample, vocabulary, tokenizer, max_tokens=12, learn_images=False)
        assert [int(one.target.sum()) for one in only.segments] == [2, 0, 0, 0, 1, 2, 1]

    def test_parts_of_a_long_document(self, sample, vocabulary: Vocabulary, tokenizer):
        found = set()
        for seed in range(40):
            part = self.laid_out(sample, vocabulary, tokenizer, seed, max_tokens=7)
            assert 0 < len(part) <= 7
            found.add(tuple(torch.cat([one.ids for one in part.segments]).tolist()))
        assert len(found) == 4  # one from each text and image on
        assert (4, 5, vocabulary.eos_id) in found

    def test_images_without_codes(self, sample, vocabulary: Vocabulary, tokenizer):
        bare = {"__key__": "a", "json": sample["json"], "jpg": jpeg("red")}
        with pytest.raises(ValueError, match="no codes of them; data_pipelines.tokenize_images"):
            self.laid_out(bare, vocabulary, tokenizer, max_tokens=12)
        del bare["jpg"]
        with pytest.raises(ValueError, match="its content has 1 images, but there are 0"):
            self.laid_out(bare, vocabulary, tokenizer, max_tokens=12)
