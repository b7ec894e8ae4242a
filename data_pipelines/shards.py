"""Tar shards in webdataset's layout: found, opened, read sample by sample, and written.

A sample is a dict of bytes by file extension ("png", "txt", "json", "codes.npy"), with its name in
"__key__" and its shard in "__url__".
"""

from __future__ import annotations

import glob
import io
import json
import os
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_iterator

Sample = dict[str, Any]
OPEN_ATTEMPTS = 3
BROKEN_ARCHIVE = (tarfile.TarError, EOFError, zlib.error)


class BrokenShard(Exception):
    """A shard that ends too early or is no tar; what came before in it is good."""


def expand_urls(urls: str | Path | Iterable[str | Path]) -> list[str]:
    """Patterns -> shards, in order. Raises ValueError where a pattern matches nothing.

    Braces count and choose ("shards/{000..127}.tar"), `*` and `?` match local files and those of
    fsspec ("s3://bucket/*.tar"), a local folder means the *.tar in it; `pipe:` is left as it is.
    """
    patterns = [urls] if isinstance(urls, str | Path) else list(urls)
    if not patterns:
        raise ValueError("the list of shards is empty; name at least one, such as data/train/*.tar")
    found = []
    for pattern in map(str, patterns):
        braced = [pattern] if pattern.startswith("pipe:") else _expand_braces(pattern)
        for url in braced:
            found.extend(_matches(url))
    return found


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(webdataset.shardlists.expand_urls(pattern))
    except ValueError as error:
        raise ValueError(f"shards {pattern}: the braces do not match ({error})") from None


def _matches(url: str) -> list[str]:
    if url.startswith(("pipe:", "http://", "https://")):
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
    """A shard as a byte stream: local path, `pipe:command`, http(s), or what fsspec knows (s3).

    Another attempt follows where a server does not answer. Raises OSError, with the url.
    """
    for attempt in range(OPEN_ATTEMPTS):
        try:
            if url.startswith("pipe:"):
                return webdataset.gopen(url)
            if url.startswith(("http://", "https://")):
                return urllib.request.urlopen(url, timeout=60)
            if "://" in url:
                return fsspec.open(url, "rb").open()
            return open(url, "rb")
        except (OSError, ValueError, ImportError) as error:
            lasting = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if lasting or refused or not isinstance(error, OSError) or attempt + 1 == OPEN_ATTEMPTS:
                raise OSError(f"shard {url} cannot be opened: {error}") from error
            time.sleep(2.0**attempt)
    raise AssertionError("unreachable")


class _Tail(io.RawIOBase):
    """Passes a stream on and remembers its first and last bytes, where tar marks its end."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.head = b""
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        if not self.head:
            self.head = data[:6]
        self.last = (self.last + data)[-1024:]
        return data

    @property
    def is_compressed(self) -> bool:
        return self.head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))


def read_shard(url: str) -> Iterator[Sample]:
    """Samples of a shard, in order.

    Raises BrokenShard where the tar is damaged or ends before its end mark, which tarfile itself
    passes over; the sample that the break cuts is not yielded. Raises OSError where the shard
    cannot be opened or the connection breaks.
    """
    with closing(open_shard(url)) as stream:
        tail = _Tail(stream)
        files = ({**file, "__url__": url} for file in tar_file_iterator(tail))
        held: Sample | None = None  # one behind, because the end decides whether it is whole
        try:
            for sample in group_by_keys(files):
                if held is not None:
                    yield held
                held = sample
            while tail.read(1 << 16):
                pass
        except (*BROKEN_ARCHIVE, ValueError) as error:
            after = f", after sample {held['__key__']}" if held else ""
            raise BrokenShard(f"{error}{after}") from error
        except OSError as error:
            if url.startswith("pipe:") or "CRC" in str(error) or "gzip" in str(error):
                raise BrokenShard(str(error)) from error
            raise OSError(f"shard {url}: {error}") from error
        if not tail.is_compressed and (len(tail.last) < 1024 or any(tail.last)):
            key = held["__key__"] if held else None
            raise BrokenShard(f"the tar ends before its end mark, in or after sample {key}")
        if held is not None:
            yield held


def write_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write beside, then rename: `path` is either whole or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Samples -> one tar, the same bytes for the same samples; returns how many there were."""
    count = 0

    def write(file: BinaryIO) -> None:
        nonlocal count
        with webdataset.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
            for sample in samples:
                tar.write(sample)
                count += 1

    write_file(path, write)
    return count


def write_shards(
    samples: Iterable[Sample],
    folder: Path,
    *,
    samples_per_shard: int,
    bytes_per_shard: int,
) -> dict[str, int]:
    """Samples -> folder/000000.tar, 000001.tar ...; returns the number of samples of each."""
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
    return counts


def write_json(path: Path, value: object) -> None:
    """JSON that people read, whole or not at all."""
    text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    write_file(path, lambda file: file.write(text.encode()) and None)
