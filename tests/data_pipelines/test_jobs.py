"""The jobs as a shell runs them: what they write, that they go on, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines import write_shards
from data_pipelines.shards.shards import expand_urls, read_shard


class TestWriteShards:
    @pytest.fixture
    def jobs(self):
        return {name: getattr(write_shards, name) for name in ("emoji", "folder", "coco", "text")}

    def test_text(self, shell, jobs, tmp_path):
        (tmp_path / "x.jsonl").write_text("".join(f'{{"q": "text {i}"}}\n' for i in range(25)))
        options = ["--source", tmp_path / "x.jsonl", "--out", tmp_path / "out", "--field", "q"]
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

    def test_data_that_has_changed_is_noticed(self, shell, jobs, tmp_path):
        images, out = tmp_path / "in", tmp_path / "out"
        images.mkdir()
        Image.new("RGB", (4, 4)).save(images / "a.png")
        job = ["folder", "--images", images, "--out", out]
        assert shell(jobs, *job)[0] == 0
        assert shell(jobs, *job)[0] == 0
        (images / ".DS_Store").write_text("x")
        (images / "notes.md").write_text("x")
        assert shell(jobs, *job)[0] == 0
        for change in ("b.png", "a.txt"):
            before = {path: path.read_bytes() for path in images.iterdir()}
            (images / change).write_bytes(before[images / "a.png"])
            status, said = shell(jobs, *job)
            assert status == 2
            assert f"{images} has 2 files and had 1" in said
            (images / change).unlink()
        Image.new("RGB", (4, 4), "red").save(images / "a.png")
        status, said = shell(jobs, *job)
        assert (status, said.count("\n")) == (2, 1)
        assert "has changed since" in said

    @pytest.mark.parametrize("job", ["text", "conversations", "coco"])
    def test_files_and_their_images_that_have_changed(self, shell, jobs, tmp_path, job):
        out, images, path = tmp_path / "out", tmp_path / "images", tmp_path / "a.jsonl"
        images.mkdir()
        Image.new("RGB", (4, 4)).save(images / "a.png")
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        options, content = {
            "text": (["--source", path], {"text": "hi"}),
            "conversations": (["--source", path, "--images", images], {"messages": turns}),
            "coco": (
                ["--captions", path, "--images", images],
                {
                    "images": [{"id": 1, "file_name": "a.png"}],
                    "annotations": [{"image_id": 1, "caption": "hi"}],
                },
            ),
        }[job]
        jobs = {**jobs, "conversations": write_shards.conversations}
        path.write_text(json.dumps(content))
        command = [job, *options, "--out", out]
        assert shell(jobs, *command)[0] == 0
        path.write_text(json.dumps(content))  # the same again
        assert shell(jobs, *command)[0] == 0
        path.write_text(json.dumps(content).replace("hi", "ho"))
        status, said = shell(jobs, *command)
        assert (status, said.count("\n")) == (2, 1)
        assert f"{path} has other contents" in said
        if job != "text":
            path.write_text(json.dumps(content))
            Image.new("RGB", (4, 4), "red").save(images / "a.png")
            status, said = shell(jobs, *command)
            assert status == 2
            assert f"{images} has" in said

    @pytest.mark.parametrize(
        "damage", [{"given": None}, {"settings": []}, {"given": {"x.jsonl": 3}}, {"given": {}}]
    )
    def test_an_index_that_does_not_say_of_what_it_is(self, shell, jobs, tmp_path, damage):
        (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
        job = ["text", "--source", tmp_path / "x.jsonl", "--out", tmp_path / "out"]
        assert shell(jobs, *job)[0] == 0
        index = tmp_path / "out/index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | damage))
        status, said = shell(jobs, *job)
        assert (status, said.count("\n")) == (2, 1)
        assert str(tmp_path / "out") in said

    def test_the_index_counts_and_names(self, shell, jobs, tmp_path, capsys):
        lines = ['{"text": "a"}', '{"text": "cut \\ud83d"}', '{"text": "b"}']
        (tmp_path / "x.jsonl").write_text("\n".join(lines))
        assert (
            shell(jobs, "text", "--source", tmp_path / "x.jsonl", "--out", tmp_path / "o")[0] == 0
        )
        report = json.loads((tmp_path / "o/index.json").read_text())["report"]
        assert (report["read"], report["written"], report["broken"]) == (3, 2, 1)
        (cases,) = report["left_out"]
        assert cases["first"] == [f"{tmp_path}/x.jsonl, line 2"]
        assert "half of a character" in cases["reason"]

    def test_shards_of_a_run_that_was_interrupted_are_no_part_of_the_next(
        self, shell, jobs, tmp_path
    ):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/000000.tar").write_bytes(b"old")
        (tmp_path / "out/000001.tar").write_bytes(b"old")
        (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
        assert (
            shell(jobs, "text", "--source", tmp_path / "x.jsonl", "--out", tmp_path / "out")[0] == 0
        )
        assert expand_urls(tmp_path / "out") == [f"{tmp_path}/out/000000.tar"]
        assert (tmp_path / "out/000001.tar.leftover").read_bytes() == b"old"

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

    @pytest.mark.font
    def test_emoji(self, shell, jobs, tmp_path, monkeypatch):
        source = write_shards.emoji_source
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
        assert json.loads((tmp_path / "out/index.json").read_text())["report"]["written"] == 5

    @pytest.mark.parametrize(
        "options, message",
        [
            (["folder", "--images", "no/where", "--out", "x"], "no/where"),
            (["emojis"], "emojis"),
            (["text", "--out", "x"], "source"),
            (["text", "--source", "nothing.jsonl", "--out", "x"], "nothing.jsonl"),
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
