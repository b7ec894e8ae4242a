"""The jobs as a shell runs them: what they write, that they go on, and how they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import command_line, tokenize_images, write_shards
from data_pipelines.shard_job import shard_names
from data_pipelines.shards import expand_urls, read_shard, write_shard
from data_pipelines.source import read_array
from data_pipelines.write_shards import png_bytes


class FakeTokenizer(torch.nn.Module):
    """A 4 x 4 picture is one code, its red value."""

    codebook_size = 256
    image_size = 4
    downsampling = 4

    def encode(self, pixels):
        assert pixels.shape[1:] == (3, 4, 4)
        return ((pixels[:, 0, 0, 0] + 1) * 127.5).round().long()[:, None]


@pytest.fixture
def image_shards(tmp_path):
    def sample(number):
        return {
            "__key__": f"{number:03d}",
            "png": png_bytes(Image.new("RGB", (4, 4), (number, 9, 9))),
            "txt": str(number).encode(),
        }

    for shard in range(4):
        path = tmp_path / f"images/{shard:06d}.tar"
        write_shard(path, map(sample, range(shard * 5, shard * 5 + 5)))
    return tmp_path / "images"


@pytest.fixture
def tokenizer_folder(tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(tokenize_images, "load_image_tokenizer", lambda folder: FakeTokenizer())
    return folder


@pytest.fixture
def shell(monkeypatch, capsys):
    """Runs a job with options; gives its exit status and what it said on stderr."""

    def run(job, *options):
        monkeypatch.setattr(sys, "argv", ["job", *map(str, options)])
        try:
            command_line.run(job)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def codes(folder) -> dict[str, int]:
    return {
        sample["__key__"]: int(read_array(sample["codes.npy"])[0])
        for url in expand_urls(folder)
        for sample in read_shard(url)
    }


ALL = {f"{n:03d}": n for n in range(20)}


class TestTokenizeImages:
    def test_codes_beside_texts(self, image_shards, tokenizer_folder, tmp_path):
        tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out", batch_size=3)
        assert codes(tmp_path / "out") == ALL
        sample = next(read_shard(expand_urls(tmp_path / "out")[0]))
        assert set(sample) == {"__key__", "__url__", "txt", "codes.npy"}
        assert read_array(sample["codes.npy"]).dtype == np.uint16

    def test_pictures_can_stay(self, image_shards, tokenizer_folder, tmp_path):
        tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "o", keep_images=True)
        assert "png" in next(read_shard(expand_urls(tmp_path / "o")[0]))

    def test_processes_share_the_shards(
        self, image_shards, tokenizer_folder, tmp_path, monkeypatch
    ):
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "3")
            before = len(list(tmp_path.glob("out/*.tar")))
            tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")
            assert len(list(tmp_path.glob("out/*.tar"))) - before == (2 if rank == 0 else 1)
        assert codes(tmp_path / "out") == ALL

    def test_it_goes_on_after_a_kill(self, image_shards, tokenizer_folder, tmp_path, monkeypatch):
        out = tmp_path / "out"
        real, calls = FakeTokenizer.encode, []

        def dies(self, pixels):
            calls.append(len(pixels))
            if len(calls) == 5:  # in the middle of the third shard
                raise SystemExit(137)
            return real(self, pixels)

        monkeypatch.setattr(FakeTokenizer, "encode", dies)
        with pytest.raises(SystemExit):
            tokenize_images.main(str(image_shards), tokenizer_folder, out, batch_size=3)
        monkeypatch.setattr(FakeTokenizer, "encode", real)
        done = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        assert [path.name for path in sorted(done)] == ["000000.tar", "000001.tar"]
        # a kill -9 leaves the half-written file as well
        (out / "000002.tar.part").write_bytes(b"half")
        tokenize_images.main(str(image_shards), tokenizer_folder, out, batch_size=3)
        assert codes(out) == ALL
        assert all(path.stat().st_mtime_ns == when for path, when in done.items())
        assert not list(out.glob("*.part"))

    def test_it_says_when_nothing_is_left(
        self, image_shards, tokenizer_folder, tmp_path, monkeypatch, capsys
    ):
        tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")
        monkeypatch.setattr(tokenize_images, "load_image_tokenizer", None)
        tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")
        assert "already written" in capsys.readouterr().out

    def test_broken_pictures_are_counted_and_skipped(
        self, image_shards, tokenizer_folder, tmp_path, capsys
    ):
        good = list(read_shard(str(image_shards / "000001.tar")))
        good[2]["png"] = good[2]["png"][:30]
        del good[3]["png"]
        write_shard(image_shards / "000001.tar", good)
        out = tmp_path / "out"
        tokenize_images.main(str(image_shards), tokenizer_folder, out, max_broken=0.02)
        assert codes(out) == {k: v for k, v in ALL.items() if v not in (7, 8)}
        said = capsys.readouterr().out
        assert "18 samples" in said
        assert f"{image_shards / '000001.tar'}, sample 007" in said
        assert "2 skipped" in said
        with pytest.raises(ValueError, match="sample 007"):
            tokenize_images.main(
                str(image_shards), tokenizer_folder, tmp_path / "strict", max_broken=0.0
            )
        assert not list(tmp_path.glob("strict/*.part"))

    def test_pictures_of_too_many_pixels_are_skipped(
        self, image_shards, tokenizer_folder, tmp_path
    ):
        one = next(read_shard(str(image_shards / "000000.tar")))
        large = {**one, "__key__": "large", "png": png_bytes(Image.new("RGB", (40, 40)))}
        write_shard(image_shards / "000009.tar", [large])
        out = tmp_path / "out"
        tokenize_images.main(
            str(image_shards), tokenizer_folder, out, max_broken=0.2, max_pixels=1000
        )
        assert "large" not in codes(out)
        with pytest.raises(ValueError, match="sample large.* 40 x 40 pixels are more than 1,000"):
            tokenize_images.main(
                str(image_shards),
                tokenizer_folder,
                tmp_path / "strict",
                max_broken=0,
                max_pixels=1000,
            )

    def test_a_truncated_shard(self, image_shards, tokenizer_folder, tmp_path, capsys):
        data = (image_shards / "000003.tar").read_bytes()
        (image_shards / "000003.tar").write_bytes(data[: len(data) // 2 - 3000])
        tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")
        got = codes(tmp_path / "out")
        assert set(range(15)) <= set(got.values()) < set(range(20))
        assert f"{image_shards / '000003.tar'}, rest of the shard" in capsys.readouterr().out

    def test_codes_of_two_tokenizers_are_not_mixed(self, image_shards, tokenizer_folder, tmp_path):
        tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")
        (tokenizer_folder / "config.json").write_text('{"other": 1}')
        with pytest.raises(ValueError, match="another tokenizer"):
            tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")

    def test_names(self):
        name = shard_names
        assert name(["a/x.tar", "s3://b/y.tar.gz", "http://h/z.tar?v=1"]) == [
            "x.tar",
            "y.tar",
            "z.tar",
        ]
        assert name(["a/x.tar", "b/x.tar"]) == ["000000.tar", "000001.tar"]
        assert name(["pipe:cat x.tar"]) == ["000000.tar"]

    def test_options_that_are_wrong(self, shell, image_shards, tokenizer_folder, tmp_path):
        given = ["--shards", image_shards, "--tokenizer", tokenizer_folder, "--out", tmp_path / "o"]
        for options, message in (
            ([*given, "--batchsize", "3"], "--batchsize"),
            ([*given, "--batch_size", "x"], "batch_size"),
            ([*given, "--batch_size", "0"], "batch_size 0"),
            ([*given, "--fit", "squeeze"], "squeeze"),
            (given[:4], "out"),
            ([*given, "--shards", tmp_path / "none"], "none"),
            ([*given, "--tokenizer", tmp_path / "nowhere"], "nowhere"),
        ):
            status, said = shell(tokenize_images.main, *options)
            assert status == 2, options
            assert message in said
            assert said.count("\n") == 1, said
            assert "Traceback" not in said


class TestWriteShards:
    @pytest.fixture
    def jobs(self):
        return {name: getattr(write_shards, name) for name in ("emoji", "folder", "coco", "text")}

    def test_text(self, shell, jobs, tmp_path):
        (tmp_path / "x.jsonl").write_text("".join(f'{{"q": "text {i}"}}\n' for i in range(25)))
        options = ["--file", tmp_path / "x.jsonl", "--out", tmp_path / "out", "--field", "q"]
        status, _ = shell(jobs, "text", *options, "--samples_per_shard", "10")
        assert status == 0
        urls = expand_urls(tmp_path / "out")
        assert [len(list(read_shard(url))) for url in urls] == [10, 10, 5]
        index = json.loads((tmp_path / "out/index.json").read_text())
        assert index["settings"]["field"] == "q"
        # the same again is nothing to do; anything else is refused
        before = [Path(url).stat().st_mtime_ns for url in urls]
        assert shell(jobs, "text", *options, "--samples_per_shard", "10")[0] == 0
        assert [Path(url).stat().st_mtime_ns for url in urls] == before
        status, said = shell(jobs, "text", *options, "--samples_per_shard", "9")
        assert status == 2
        assert "samples_per_shard was 10, now 9" in said

    def test_folder_from_a_file_of_options(self, shell, jobs, tmp_path):
        (tmp_path / "in").mkdir()
        for name in "abc":
            Image.new("RGB", (4, 4)).save(tmp_path / f"in/{name}.png")
        (tmp_path / "x.yaml").write_text(
            f"folder:\n  images: {tmp_path / 'in'}\n  out: {tmp_path / 'out'}\n"
        )
        assert shell(jobs, "--config", tmp_path / "x.yaml")[0] == 0
        (url,) = expand_urls(tmp_path / "out")
        assert [sample["txt"] for sample in read_shard(url)] == [b"a", b"b", b"c"]

    def test_an_unknown_option_in_a_file(self, shell, jobs, tmp_path):
        (tmp_path / "x.yaml").write_text("folder:\n  images: a\n  out: b\n  shard_size: 3\n")
        status, said = shell(jobs, "--config", tmp_path / "x.yaml")
        assert status == 2
        assert "shard_size" in said
        assert said.count("\n") == 1

    def test_emoji(self, shell, jobs, tmp_path, monkeypatch):
        source = write_shards.emoji_source
        try:
            source.find_font()
        except ValueError as error:
            pytest.skip(str(error))
        toned = [c for c in source.fully_qualified() if source.is_held_out(c)][:3]
        monkeypatch.setattr(source, "fully_qualified", lambda: ["\U0001f600", "\U0001f60e", *toned])
        status, _ = shell(jobs, "emoji", "--out", tmp_path / "out", "--size", "16")
        assert status == 0
        for split, count in (("train", 2), ("held_out", len(toned))):
            (url,) = expand_urls(tmp_path / "out" / split)
            samples = list(read_shard(url))
            assert len(samples) == count
            for sample in samples:
                notes = json.loads(sample["json"])
                assert notes["names"]["en"] == notes["name"] == sample["txt"].decode()
                assert notes["held_out"] == (split == "held_out")
                assert {"de", "ja", "ar"} < set(notes["names"])
        assert "left_out" in json.loads((tmp_path / "out/index.json").read_text())

    @pytest.mark.parametrize(
        "options, message",
        [
            (["folder", "--images", "no/where", "--out", "x"], "no/where"),
            (["emojis"], "emojis"),
            (["text", "--out", "x"], "file"),
            (["text", "--file", "nothing.jsonl", "--out", "x"], "nothing.jsonl"),
            (["emoji", "--font", "nothing.ttf", "--out", "x"], "nothing.ttf"),
            (["emoji", "--out", "x", "--siz", "3"], "--siz"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_line(
        self, shell, jobs, options, message, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        status, said = shell(jobs, *options)
        assert status == 2
        assert message in said
        assert said.count("\n") == 1
        assert not (tmp_path / "x").exists()
