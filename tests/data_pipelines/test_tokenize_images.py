"""Codes in place of images: of every image of a sample, and of shards that are whole."""

from __future__ import annotations

import json

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import tokenize_images
from data_pipelines.jobs.shard_job import shard_names
from data_pipelines.shards.shards import BrokenShard, expand_urls, read_shard, write_shard
from data_pipelines.sources.source import read_array
from data_pipelines.write_shards import png_bytes


class FakeTokenizer(torch.nn.Module):
    """A 4 x 4 image is one code, its red value."""

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


def codes(folder) -> dict[str, int]:
    return {
        sample["__key__"]: int(read_array(sample["codes.npy"])[0])
        for url in expand_urls(folder)
        for sample in read_shard(url)
    }


ALL = {f"{n:03d}": n for n in range(20)}


def _until_broken(path):
    try:
        yield from read_shard(str(path))
    except BrokenShard:
        return


def test_codes_beside_texts(image_shards, tokenizer_folder, tmp_path):
    tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out", batch_size=3)
    assert codes(tmp_path / "out") == ALL
    sample = next(read_shard(expand_urls(tmp_path / "out")[0]))
    assert set(sample) == {"__key__", "__url__", "txt", "codes.npy"}
    assert read_array(sample["codes.npy"]).dtype == np.uint16


def test_images_can_stay(image_shards, tokenizer_folder, tmp_path):
    tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "o", keep_images=True)
    assert "png" in next(read_shard(expand_urls(tmp_path / "o")[0]))


def test_processes_share_the_shards(image_shards, tokenizer_folder, tmp_path, monkeypatch):
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        before = len(list(tmp_path.glob("out/*.tar")))
        tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")
        assert len(list(tmp_path.glob("out/*.tar"))) - before == (2 if rank == 0 else 1)
    assert codes(tmp_path / "out") == ALL


def test_it_goes_on_after_a_kill(image_shards, tokenizer_folder, tmp_path, monkeypatch):
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
    image_shards, tokenizer_folder, tmp_path, monkeypatch, capsys
):
    tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")
    monkeypatch.setattr(tokenize_images, "load_image_tokenizer", None)
    tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")
    assert "already written" in capsys.readouterr().out


def test_broken_images_are_counted_and_skipped(image_shards, tokenizer_folder, tmp_path, capsys):
    good = list(read_shard(str(image_shards / "000001.tar")))
    good[2]["png"] = good[2]["png"][:30]
    del good[3]["png"]
    write_shard(image_shards / "000001.tar", good)
    out = tmp_path / "out"
    tokenize_images.main(str(image_shards), tokenizer_folder, out, max_broken=0.02)
    assert codes(out) == {k: v for k, v in ALL.items() if v not in (7, 8)}
    said = capsys.readouterr().out
    assert "18 samples in 4 shards" in said
    assert "20 read, 18 written, 0 changed, 2 left out" in said
    assert f"({image_shards / '000001.tar'}, sample 007)" in said
    assert f"no image among its fields (txt) ({image_shards / '000001.tar'}, sample 008)" in said
    with pytest.raises(ValueError, match="sample 007"):
        tokenize_images.main(
            str(image_shards), tokenizer_folder, tmp_path / "strict", max_broken=0.0
        )
    assert not list(tmp_path.glob("strict/*.part"))


def test_shards_that_are_damaged_are_named_and_not_done(image_shards, tokenizer_folder, tmp_path):
    out, cut, empty = tmp_path / "out", image_shards / "000001.tar", image_shards / "000002.tar"
    whole = cut.read_bytes()
    counts = {path.name: 5 for path in sorted(image_shards.glob("*.tar"))}
    index = {"shards": {"": counts}}
    (image_shards / "index.json").write_text(json.dumps(index))
    cut.write_bytes(whole[: len(whole) // 2 - 3000])
    write_shard(empty, [])
    for _ in range(2):  # the second time as well: nothing of them was recorded as done
        with pytest.raises(ValueError, match="2 of 4 shards cannot be used") as caught:
            tokenize_images.main(str(image_shards), tokenizer_folder, out)
        said = str(caught.value)
        kept = len(list(_until_broken(cut)))
        assert f"{cut}: truncated tar" in said
        index = image_shards / "index.json"
        assert f"{kept} samples could be read, {index} says 5: {5 - kept} are missing" in said
        assert f"{empty}: it is another than its index says; 0 samples could be read" in said
        assert sorted(path.name for path in out.glob("*.tar")) == ["000000.tar", "000003.tar"]
    cut.write_bytes(whole)
    with pytest.raises(ValueError, match=r"1 of 4 shards .*000002\.tar"):
        tokenize_images.main(str(image_shards), tokenizer_folder, out)
    assert len(codes(out)) == 15


@pytest.mark.parametrize("content", ["[]", "{", '{"shards": 3}', '{"shards": {"": {"x": 1}}}'])
def test_an_index_of_others_says_nothing(image_shards, tokenizer_folder, tmp_path, content):
    (image_shards / "index.json").write_text(content)
    (image_shards / "000000_stats.json").write_text('{"successes": 5}')
    tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")
    assert codes(tmp_path / "out") == ALL
    (image_shards / "000001_stats.json").write_text('{"successes": 7}')
    with pytest.raises(ValueError, match="000001_stats.json says 7: 2 are missing"):
        tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "other")


def test_shards_without_a_sample_that_can_be_used(image_shards, tokenizer_folder, tmp_path):
    samples = list(read_shard(str(image_shards / "000001.tar")))
    write_shard(image_shards / "000001.tar", [{**one, "png": b"x"} for one in samples])
    write_shard(image_shards / "000002.tar", [])
    with pytest.raises(ValueError, match="none of its 5 samples can be used") as caught:
        tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "o", max_broken=1.0)
    assert "000002.tar: none of its 0 samples can be used: it is empty" in str(caught.value)
    assert not (tmp_path / "o/000001.tar").exists()


def test_several_images_or_none_in_a_conversation(tokenizer_folder, tmp_path):
    def sample(number, images, text="<image>"):
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        return {
            "__key__": f"{number}",
            **{name: png_bytes(Image.new("RGB", (4, 4), (n, 0, 0))) for name, n in images},
            "json": json.dumps({"messages": said}).encode(),
        }

    given = [
        sample(0, [("png", 7)]),
        sample(1, [("0.png", 8), ("1.png", 9)]),
        sample(2, [], text="2 + 2?"),
        sample(3, [("10.png", 1), ("2.png", 2)]),
        sample(4, []),  # its image is lost
        sample(5, [("png", 1), ("1.png", 2)]),  # which is the first?
    ]
    write_shard(tmp_path / "in/000000.tar", given)
    tokenize_images.main(
        str(tmp_path / "in"), tokenizer_folder, tmp_path / "out", batch_size=2, max_broken=0.02
    )
    one, two, text, order = read_shard(str(tmp_path / "out/000000.tar"))
    found = [
        {name: int(read_array(value)[0]) for name, value in sample.items() if "npy" in name}
        for sample in (one, two, text, order)
    ]
    assert found == [
        {"codes.npy": 7},
        {"0.codes.npy": 8, "1.codes.npy": 9},
        {},
        {"2.codes.npy": 2, "10.codes.npy": 1},
    ]
    assert {k: v for k, v in text.items() if k != "__url__"} == given[2]
    assert "png" not in " ".join([*one, *two, *order])


def test_shards_that_have_changed_are_noticed(image_shards, tokenizer_folder, tmp_path):
    out, first = tmp_path / "out", image_shards / "000000.tar"
    tokenize_images.main(str(image_shards), tokenizer_folder, out)
    samples = list(read_shard(str(first)))
    write_shard(first, samples)  # the same again
    tokenize_images.main(str(image_shards), tokenizer_folder, out)
    samples[0]["png"] = png_bytes(Image.new("RGB", (4, 4), (200, 9, 9)))
    write_shard(first, samples)
    with pytest.raises(ValueError, match=r"images/000000\.tar has changed since .*delete"):
        tokenize_images.main(str(image_shards), tokenizer_folder, out)
    (out / "000000.tar").unlink()
    tokenize_images.main(str(image_shards), tokenizer_folder, out)
    assert codes(out)["000"] == 200


def test_shards_of_stores_that_have_changed_are_noticed(
    image_shards, tokenizer_folder, tmp_path, capsys
):
    place = "memory://changing/a.tar"
    for shard in ("000000", "000001"):
        with fsspec.open(place, "wb") as file:
            file.write((image_shards / f"{shard}.tar").read_bytes())
        if shard == "000000":
            for _ in range(2):
                tokenize_images.main(place, tokenizer_folder, tmp_path / "out")
            assert capsys.readouterr().out.endswith("out: already written\n")
    with pytest.raises(ValueError, match=r"memory://changing/a\.tar has changed since"):
        tokenize_images.main(place, tokenizer_folder, tmp_path / "out")


def test_shards_of_which_nothing_is_known_are_not_called_the_same(
    image_shards, tokenizer_folder, tmp_path, capsys
):
    command = f"pipe:cat {image_shards}/000000.tar"
    for _ in range(2):
        tokenize_images.main(command, tokenizer_folder, tmp_path / "out", allow_pipe=True)
    said = capsys.readouterr().out
    assert said.endswith("already written, of data that is not compared with what it is now\n")


def test_shards_that_are_gone_are_named(image_shards, tokenizer_folder, tmp_path, capsys):
    tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")
    (image_shards / "000003.tar").unlink()
    capsys.readouterr()
    tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")
    said = capsys.readouterr().err
    assert f"{tmp_path}/out/000003.tar was made of {image_shards}/000003.tar, which is gone" in said


def test_the_index_says_what_became_of_all_samples(
    image_shards, tokenizer_folder, tmp_path, monkeypatch
):
    samples = list(read_shard(str(image_shards / "000001.tar")))
    write_shard(image_shards / "000001.tar", [{**samples[0], "png": b"x"}, *samples[1:]])
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")
    record = json.loads((tmp_path / "out/codes.json").read_text())
    report = record["report"]
    assert (record["shards"], report["read"], report["written"]) == (4, 20, 19)
    assert report["left_out"][0]["first"] == [f"{image_shards}/000001.tar, sample 005"]


def test_commands_are_run_only_where_that_is_allowed(image_shards, tokenizer_folder, tmp_path):
    command = f"pipe:cat {image_shards}/000000.tar; touch {tmp_path}/ran"
    with pytest.raises(ValueError, match="allow_pipe"):
        tokenize_images.main(command, tokenizer_folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    tokenize_images.main(command, tokenizer_folder, tmp_path / "out", allow_pipe=True)
    assert (tmp_path / "ran").exists()


def test_codes_of_two_tokenizers_are_not_mixed(image_shards, tokenizer_folder, tmp_path):
    tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")
    (tokenizer_folder / "config.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match="another tokenizer"):
        tokenize_images.main(str(image_shards), tokenizer_folder, tmp_path / "out")


def test_names():
    name = shard_names
    assert name(["a/x.tar", "s3://b/y.tar.gz", "http://h/z.tar?v=1"]) == [
        "x.tar",
        "y.tar",
        "z.tar",
    ]
    assert name(["a/x.tar", "b/x.tar"]) == ["000000.tar", "000001.tar"]
    assert name(["pipe:cat x.tar"]) == ["000000.tar"]


def test_options_that_are_wrong(shell, image_shards, tokenizer_folder, tmp_path):
    given = ["--shards", image_shards, "--tokenizer", tokenizer_folder, "--out", tmp_path / "o"]
    for options, message in (
        ([*given, "--batchsize", "3"], "--batchsize"),
        ([*given, "--batch_size", "x"], "batch_size"),
        ([*given, "--batch_size", "0"], "batch_size is 0"),
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


def test_images_of_too_many_pixels_are_skipped(image_shards, tokenizer_folder, tmp_path):
    one = next(read_shard(str(image_shards / "000000.tar")))
    large = {**one, "__key__": "large", "png": png_bytes(Image.new("RGB", (40, 40)))}
    write_shard(image_shards / "000009.tar", [one, large])
    out = tmp_path / "out"
    tokenize_images.main(str(image_shards), tokenizer_folder, out, max_broken=0.2, max_pixels=1000)
    assert "large" not in codes(out)
    with pytest.raises(ValueError, match="40 x 40 pixels are more than 1,000.*sample large"):
        tokenize_images.main(
            str(image_shards),
            tokenizer_folder,
            tmp_path / "strict",
            max_broken=0,
            max_pixels=1000,
        )
