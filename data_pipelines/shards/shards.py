"""Tar shards in webdataset's layout: found, opened, read sample by sample, and written.

A sample is a dict of bytes by file extension ("png", "txt", "json", "codes.npy"), with its name in
"__key__" and its shard in "__url__".
"""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import webdataset
from webdataset.tariterators import base_plus_ext, group_by_keys

from data_pipelines.sources.text_files import parsed
from mmdlm.atomic_files import atomic_write

Sample = dict[str, Any]
ATTEMPTS = 3
PAUSE = 1.0  # seconds before the next attempt, doubled each time
END_MARK = bytes(1024)
MOST_BYTES = 1 << 28  # of a sample: a tar may say that it holds any number
META = re.compile(r"__[^/]*__($|/)")  # names of what webdataset keeps beside the samples
INDEX = "index.json"  # of a folder of shards, written last: where it is, they are whole
COMPRESSED: dict[bytes, Any] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}


class BrokenShard(Exception):
    """A shard that ends too early or is no tar; what came before in it is good."""


class Unreachable(OSError):
    """A shard that cannot be opened or read to its end: nothing is known about what it holds."""

    is_final = False


def expand_urls(urls: str | Path | Iterable[str | Path], *, allow_pipe: bool = False) -> list[str]:
    """Patterns -> shards, in order. Raises ValueError where a pattern matches nothing.

    Braces count and choose ("shards/{000..127}.tar"), `*` and `?` match local files and those of
    fsspec ("s3://bucket/*.tar"), a local folder means the *.tar in it. `pipe:COMMAND` runs a shell
    command whose output is the shard: only with `allow_pipe`.
    """
    patterns = [urls] if isinstance(urls, str | Path) else list(urls)
    if not patterns:
        raise ValueError("the list of shards is empty; name at least one, such as data/train/*.tar")
    found = []
    for pattern in map(str, patterns):
        braced = [pattern] if pattern.startswith("pipe:") else _expand_braces(pattern)
        for url in braced:
            if not url.startswith("pipe:"):
                # A file may have such a name, and is no command.
                found += [f"./{one}" if one.startswith("pipe:") else one for one in _matches(url)]
            elif allow_pipe:
                found.append(url)
            else:
                raise ValueError(
                    f"shards {pattern}: this command is run only where allow_pipe is true; set it "
                    "for a list that you trust, or name files"
                )
    return found


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(webdataset.shardlists.expand_urls(pattern))
    except ValueError as error:
        raise ValueError(f"shards {pattern}: the braces do not match ({error})") from None


def _matches(url: str) -> list[str]:
    if url.startswith(("http://", "https://")):
        return [url]
    path = url.removeprefix("file://")
    if "://" in path:
        if not glob.has_magic(path):
            return [path]
        filesystem, inner = fsspec.core.url_to_fs(path)
        found = sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(inner))
    elif os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    elif glob.has_magic(path):
        found = sorted(glob.glob(path))
    else:
        found = [path] if os.path.isfile(path) else []
    if not found:
        raise ValueError(f"shards {url}: no such file; write them first or correct the pattern")
    return found


def open_shard(url: str) -> BinaryIO:
    """Open a shard as a byte stream: path, `pipe:command`, http(s), or what fsspec knows (s3).

    Raises Unreachable, with the url, after another attempt or two where a server does not answer.
    """
    for attempt in range(ATTEMPTS):
        try:
            if url.startswith("pipe:"):
                return webdataset.gopen(url)
            if url.startswith(("http://", "https://")):
                return urllib.request.urlopen(url, timeout=60)
            if "://" in url:
                return fsspec.open(url, "rb").open()
            return open(url, "rb")
        # what stores raise is up to their libraries
        except Exception as error:
            lasting = isinstance(
                error, FileNotFoundError | PermissionError | IsADirectoryError | ValueError
            ) or (isinstance(error, urllib.error.HTTPError) and error.code < 500)
            if lasting or isinstance(error, ImportError) or attempt + 1 == ATTEMPTS:
                raise Unreachable(f"shard {url} cannot be opened: {error}") from error
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError


class _Download(io.RawIOBase):
    """A stream whose failures to deliver are told apart from damage in what it delivers."""

    def __init__(self, stream: BinaryIO, url: str) -> None:
        self.stream = stream
        self.url = url

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.stream.read(len(buffer))
            missing = 0 if data else getattr(self.stream, "length", None)  # of an HTTP response
        except Exception as error:  # stores raise what their libraries please
            raise Unreachable(f"shard {self.url}: {error}") from error
        if missing:
            raise Unreachable(f"shard {self.url}: the connection closed {missing} bytes too early")
        buffer[: len(data)] = data
        return len(data)


class _Tail(io.RawIOBase):
    """ForwardPasses a stream on and remembers its last bytes, where a tar has its end mark."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.last = (self.last + data[-len(END_MARK) :])[-len(END_MARK) :]
        return data


def read_shard(url: str) -> Iterator[Sample]:
    """Yield the samples of a shard, in order.

    Raises BrokenShard where the tar is damaged or ends before its end mark (which tarfile itself
    passes over in silence); the sample that the break cuts is not given out. Where a connection
    breaks, the shard is opened again and what was given out is passed over; Unreachable follows
    when that does not help.
    """
    given = failures = 0
    while True:
        try:
            for number, sample in enumerate(_read_once(url)):
                if number == given:
                    yield sample
                    given += 1
            return
        except Unreachable as error:
            failures += 1
            if error.is_final or failures == ATTEMPTS:
                raise
            time.sleep(PAUSE * 2**failures)


def _read_once(url: str) -> Iterator[Sample]:
    try:
        stream = open_shard(url)
    except Unreachable as error:
        error.is_final = True
        raise
    try:
        download = io.BufferedReader(_Download(stream, url), buffer_size=1 << 18)
        start = download.peek(6)
        decompress = next((d for magic, d in COMPRESSED.items() if start.startswith(magic)), None)
        tail = _Tail(decompress(download) if decompress else download)
        held: Sample | None = None  # one behind, because the end decides whether it is whole
        try:
            files = ({**file, "__url__": url} for file in _files_in(tail))
            for sample in group_by_keys(files):
                if held is not None:
                    yield held
                held = sample
            while tail.read(1 << 18):
                pass
        except Unreachable:
            raise
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as e:
            if url.startswith("pipe:"):
                _close(stream, url)  # a command that failed is no damage to the tar
            after = f", after sample {held['__key__']}" if held else ""
            raise BrokenShard(f"damaged tar: {_reason(e)}{after}") from e
        if url.startswith("pipe:"):
            _close(stream, url)
        if tail.last != END_MARK:
            at = f"in or after sample {held['__key__']}" if held else "before the first sample"
            raise BrokenShard(f"truncated tar: it ends without its end mark, {at}")
        if held is not None:
            yield held
    finally:
        with contextlib.suppress(OSError):  # a command whose output was not read to its end
            stream.close()


class _Header(tarfile.TarInfo):
    """The header of a file in a tar, of which no more is read than a sample may have."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """tarfile's; ReadError for a file that is too large, long names and the like included."""
        info = super().frombuf(buf, encoding, errors)
        if info.size > MOST_BYTES:
            raise tarfile.ReadError(_too_large(info.name, info.size))
        return info


def _files_in(stream: Any) -> Iterator[Sample]:
    """Yield the files of a tar as webdataset does, which reads files of any size into memory."""
    key, size = "", 0
    tar = tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header)  # noqa: SIM115 - not ours
    for info in tar:
        if not info.isreg() or META.match(info.name):
            continue
        name = str(base_plus_ext(info.name)[0])
        size = info.size + (size if name == key else 0)
        key = name
        if size > MOST_BYTES:
            raise ValueError(_too_large(f"sample {key}", size))
        file = tar.extractfile(info)
        assert file is not None
        yield {"fname": info.name, "data": file.read()}
        tar.members = []  # type: ignore[attr-defined]  # which would grow


def _too_large(what: str, size: int) -> str:
    return f"{what} has {size:,} bytes, and at most {MOST_BYTES:,} are read"


def _reason(error: Exception) -> str:
    return str(error.args[0] if error.args else error) or type(error).__name__


def _close(stream: BinaryIO, url: str) -> None:
    try:
        stream.close()
    except OSError as error:
        raise Unreachable(f"shard {url}: the command failed: {error}") from error


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write samples as one tar, always the same bytes for the same samples; return their number."""
    count = 0

    def write(file: BinaryIO) -> None:
        nonlocal count
        with webdataset.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
            for sample in samples:
                tar.write(sample)
                count += 1

    atomic_write(path, write)
    return count


def write_shards(
    samples: Iterable[Sample],
    folder: Path,
    *,
    samples_per_shard: int,
    bytes_per_shard: int,
) -> dict[str, int]:
    """Write samples as folder/000000.tar, 000001.tar ...; return the number of samples of each."""
    leftover = set(folder.glob("*.tar"))  # of a run that was interrupted
    counts: dict[str, int] = {}
    iterator = iter(samples)
    pending = next(iterator, None)

    def one_shard() -> Iterator[Sample]:
        nonlocal pending
        count = size = 0
        while pending is not None and count < samples_per_shard and size < bytes_per_shard:
            count += 1
            size += sum(len(v) for k, v in pending.items() if not k.startswith("_"))
            yield pending
            pending = next(iterator, None)

    while pending is not None:
        name = f"{len(counts):06d}.tar"
        counts[name] = write_shard(folder / name, one_shard())
    for path in sorted(leftover - {folder / name for name in counts}):
        path.rename(aside := path.with_name(f"{path.name}.leftover"))
        print(f"{path} is of another run, and none of these shards; it is {aside.name} now")
    return counts


def write_json(path: Path, value: object, *, part: str = ".part") -> None:
    """JSON that people read, whole or not at all; `part` as in `atomic_write`."""
    text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    atomic_write(path, lambda file: file.write(text.encode(errors="backslashreplace")), part=part)


def read_json(path: Path) -> dict[str, Any]:
    """Read a dict that `write_json` wrote; ValueError where it is damaged."""
    try:
        value = parsed(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no object but {type(value).__name__}; delete it")
    return value


# ---- what indexes say of a shard ----------------------------------------------------------------


def stats_of(shard: Path) -> Path:
    """Return the path of the file that says of what a shard was made, which is written after it."""
    return shard.with_name(f"{shard.name.removesuffix('.tar')}_stats.json")


def missing_samples(url: str, count: int) -> str:
    """Return a warning about a shard of which `count` samples were read; empty where all were.

    Nothing is known of a shard without an index.
    """
    there = indexed_samples(url)
    if there is None or there[0] == count:
        return ""
    said, index = there
    missing = f": {said - count} are missing" if said > count else ""
    return f"; {count} samples could be read, {index} says {said}{missing}"


def indexed_samples(url: str) -> tuple[int, Path] | None:
    """How many samples a local shard was written with, and where that stands; None: unknown."""
    if "://" in url or url.startswith("pipe:"):
        return None
    shard = Path(url)
    folder = shard.parent
    for index, place in (
        (stats_of(shard), ("report", "written")),
        (stats_of(shard), ("successes",)),  # of img2dataset
        (folder / INDEX, ("shards", "", shard.name)),
        (folder.parent / INDEX, ("shards", folder.name, shard.name)),
    ):
        found: Any = None
        if index.is_file():
            with contextlib.suppress(ValueError):  # of others, or damaged: it says nothing
                found = read_json(index)
        for name in place:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, int):
            return found, index
    return None
