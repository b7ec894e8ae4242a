from __future__ import annotations

import functools
import gzip
import http.server
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_pipelines.shards import shards
from data_pipelines.shards.shards import (
    BrokenShard,
    Unreachable,
    expand_urls,
    read_shard,
    write_shard,
    write_shards,
)
from mmdlm.atomic_files import atomic_write


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PAUSE", 0.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def keys(url: str) -> list[int]:
    return [int(sample["__key__"]) for sample in read_shard(url)]


def test_what_is_written_is_read(tmp_path):
    samples = [{"__key__": "a-b", "txt": "ü".encode(), "codes.npy": b"123"}, {"__key__": "c"}]
    samples[1]["json"] = b"{}"
    assert write_shard(tmp_path / "x.tar", samples) == 2
    url = str(tmp_path / "x.tar")
    assert list(read_shard(url)) == [{**sample, "__url__": url} for sample in samples]


def test_the_same_samples_give_the_same_bytes(number_shards):
    first, second = number_shards(1, 5, folder="a")[0], number_shards(1, 5, folder="b")[0]
    assert Path(first).read_bytes() == Path(second).read_bytes()


def test_shards_end_at_a_number_of_samples_or_bytes(tmp_path):
    samples = [{"__key__": f"{i}", "txt": b"x" * 10} for i in range(10)]
    counts = write_shards(samples, tmp_path / "a", samples_per_shard=4, bytes_per_shard=1000)
    assert counts == {"000000.tar": 4, "000001.tar": 4, "000002.tar": 2}
    counts = write_shards(samples, tmp_path / "b", samples_per_shard=4, bytes_per_shard=25)
    assert list(counts.values()) == [3, 3, 3, 1]


class TestPlaces:
    def test_braces_globs_folders_and_lists(self, number_shards, tmp_path):
        urls = number_shards(3, 1)
        folder = tmp_path / "numbers"
        assert expand_urls(f"{folder}/{{000000..000002}}.tar") == urls
        assert expand_urls(f"{folder}/00000{{0,2}}.tar") == [urls[0], urls[2]]
        assert expand_urls(f"{folder}/*.tar") == expand_urls(folder) == expand_urls(urls) == urls
        assert expand_urls(f"file://{urls[1]}") == [urls[1]]

    def test_addresses_are_not_looked_up(self):
        assert expand_urls("http://host/{0..2}.tar") == [f"http://host/{i}.tar" for i in range(3)]
        assert expand_urls("s3://bucket/{a,b}.tar") == ["s3://bucket/a.tar", "s3://bucket/b.tar"]
        assert expand_urls("pipe:cat {x,y}*", allow_pipe=True) == ["pipe:cat {x,y}*"]

    def test_commands_only_where_they_are_allowed(self, number_shards):
        (file,) = number_shards(1, 1)
        for urls in ("pipe:rm x", [file, "pipe:rm x"], "{pipe:rm x,a}", f"{file}::pipe:rm x"):
            with pytest.raises(ValueError, match="allow_pipe"):
                expand_urls(urls)

    def test_a_file_whose_name_is_like_a_command_is_a_file(self, number_shards, monkeypatch):
        (file,) = number_shards(1, 2)
        name = "pipe:touch ran; cat 000000.tar"
        monkeypatch.chdir(Path(file).parent)
        Path(file).rename(f"{name}.tar")
        for pattern in ("*.tar", f"file://{name}.tar"):
            (url,) = expand_urls(pattern, allow_pipe=True)
            assert keys(url) == [0, 1]
        assert os.listdir() == [f"{name}.tar"]

    @pytest.mark.parametrize("nothing", [[], "no/such.tar", "no/*.tar", "no/{0..3}.tar"])
    def test_no_shards_is_an_error_that_says_so(self, nothing):
        with pytest.raises(ValueError, match="shards"):
            expand_urls(nothing)

    def test_a_folder_without_shards(self, tmp_path):
        with pytest.raises(ValueError, match=str(tmp_path)):
            expand_urls(str(tmp_path))

    def test_pipe(self, number_shards):
        (url,) = number_shards(1, 6)
        assert keys(f"pipe:cat {url}") == list(range(6))

    def test_pipe_left_early(self, number_shards):
        (url,) = number_shards(1, 200)
        reading = read_shard(f"pipe:cat {url} {url}")
        next(reading)
        reading.close()

    def test_a_command_that_fails_is_no_damaged_shard(self, number_shards):
        (url,) = number_shards(1, 6)
        with pytest.raises(Unreachable, match="head -c 3000"):
            keys(f"pipe:head -c 3000 {url}; exit 3")

    def test_http(self, number_shards, server):
        number_shards(2, 6)
        assert [keys(u) for u in expand_urls(f"{server}/numbers/00000{{0,1}}.tar")] == [
            list(range(6)),
            list(range(6, 12)),
        ]

    def test_http_without_the_file(self, server):
        with pytest.raises(Unreachable, match=r"numbers/7\.tar.*404"):
            keys(f"{server}/numbers/7.tar")

    def test_fsspec(self, number_shards):
        (url,) = number_shards(1, 6)
        with fsspec.open("memory://bucket/a/000000.tar", "wb") as file:
            file.write(Path(url).read_bytes())
        assert expand_urls("memory://bucket/a/*.tar") == ["memory:///bucket/a/000000.tar"]
        for place in ("memory://bucket/a/000000.tar", "memory://bucket/a/*.tar"):
            assert keys(expand_urls(place)[0]) == list(range(6))

    def test_unknown_protocol(self):
        with pytest.raises(Unreachable, match="nonsense://x"):
            keys("nonsense://x.tar")

    def test_compressed(self, number_shards, tmp_path):
        (url,) = number_shards(1, 6)
        packed = tmp_path / "x.tar.gz"
        packed.write_bytes(gzip.compress(Path(url).read_bytes()))
        assert keys(str(packed)) == list(range(6))
        packed.write_bytes(packed.read_bytes()[:-40])
        with pytest.raises(BrokenShard):
            keys(str(packed))


class TestDamage:
    @pytest.mark.parametrize("size", range(512, 10240 * 2, 700))
    def test_wherever_a_tar_is_cut_it_is_noticed(self, number_shards, tmp_path, size):
        (url,) = number_shards(1, 3)  # 3 samples of 3 files, each a header and a block
        whole = Path(url).read_bytes()
        end = len(whole.rstrip(b"\0"))
        cut = tmp_path / "cut.tar"
        cut.write_bytes(whole[:size])
        got = []
        if size < end + 1024:
            with pytest.raises(BrokenShard):
                got.extend(s["__key__"] for s in read_shard(str(cut)))
        else:
            got = [sample["__key__"] for sample in read_shard(str(cut))]
        for sample in read_shard(url):  # what comes before the cut is whole
            if sample["__key__"] in got:
                assert sample == {
                    **next(s for s in _until_broken(str(cut)) if s["__key__"] == sample["__key__"]),
                    "__url__": url,
                }

    def test_no_tar_at_all(self, tmp_path):
        (tmp_path / "x.tar").write_bytes(b"<html>not found</html>" * 100)
        with pytest.raises(BrokenShard):
            keys(str(tmp_path / "x.tar"))

    @pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
    def test_more_than_memory_holds_is_not_read(self, tmp_path, kind):
        """A few kilobytes may be unpacked to any number of bytes, of which the header tells."""
        info = tarfile.TarInfo("a.txt")
        info.size, info.type = 10**12, kind
        data = info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)
        (tmp_path / "x.tar.gz").write_bytes(gzip.compress(data))
        with pytest.raises(BrokenShard, match="a.txt has 1,000,000,000,000 bytes, and at most 268"):
            keys(str(tmp_path / "x.tar.gz"))

    def test_nor_is_a_sample_of_many_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shards, "MOST_BYTES", 3000)
        samples = [
            {"__key__": "a", "txt": b"1"},
            {"__key__": "b", "x": bytes(2000), "y": bytes(999)},
        ]
        write_shard(tmp_path / "fits.tar", samples)
        assert [one["__key__"] for one in read_shard(str(tmp_path / "fits.tar"))] == ["a", "b"]
        write_shard(
            tmp_path / "x.tar", [*samples, {"__key__": "c", "x": bytes(2000), "y": bytes(1001)}]
        )
        with pytest.raises(BrokenShard, match="sample c has 3,001 bytes, and at most 3,000"):
            list(read_shard(str(tmp_path / "x.tar")))

    def test_empty_file(self, tmp_path):
        (tmp_path / "x.tar").write_bytes(b"")
        with pytest.raises(BrokenShard):
            keys(str(tmp_path / "x.tar"))

    def test_a_connection_that_breaks_is_taken_up_again(self, number_shards, monkeypatch):
        (url,) = number_shards(1, 50)
        opened = []

        class Flaky:
            def __init__(self, stream):
                self.stream, self.left = stream, 30000 * (len(opened) + 1)

            def read(self, size):
                if self.left <= 0:
                    raise ConnectionResetError("reset by peer")
                self.left -= 10000
                return self.stream.read(min(size, 10000))

            def close(self):
                self.stream.close()

        def open_shard(url):
            stream = Flaky(io.BytesIO(Path(url).read_bytes()))
            opened.append(stream)
            return stream

        monkeypatch.setattr(shards, "open_shard", open_shard)
        monkeypatch.setattr(shards, "ATTEMPTS", 9)
        assert keys(url) == list(range(50))
        assert len(opened) > 1
        monkeypatch.setattr(shards, "ATTEMPTS", 1)
        opened.clear()
        with pytest.raises(Unreachable, match="reset by peer"):
            keys(url)


def _until_broken(url: str):
    try:
        yield from read_shard(url)
    except BrokenShard:
        return


class TestWriting:
    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
    def test_a_full_disk(self, tmp_path, monkeypatch):
        (tmp_path / "x.tar.part").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"x\.tar cannot be written: No space left"):
            write_shard(tmp_path / "x.tar", [{"__key__": "a", "txt": b"b" * 100000}])
        assert os.listdir(tmp_path) == []

    def test_a_folder_in_the_way(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="cannot be made"):
            atomic_write(tmp_path / "file" / "x", lambda file: None)
