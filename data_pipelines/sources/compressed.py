"""Files that are compressed: by gzip, bzip2, xz or zstd, or the one file of a zip archive."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, cast


def open_binary(path: Path) -> BinaryIO:
    """Open a file; one that is compressed, by the ending of its name, as it was before.

    Raises ValueError: the package for its compression is not installed. Raises OSError: it cannot
    be opened.
    """
    opener = OPENERS.get(path.suffix.lower())
    return open(path, "rb") if opener is None else cast(BinaryIO, opener(path))


def inner_suffix(path: Path) -> str:
    """Return the ending of the file inside: ".jsonl" of a.jsonl and of a.jsonl.zst."""
    is_compressed = path.suffix.lower() in OPENERS
    return (path.with_suffix("") if is_compressed else path).suffix.lower()


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Raise ValueError that names the file where, within the block, it turns out to be damaged."""
    try:
        yield
    except EOFError:
        raise ValueError(f"{path} ends too early; fetch it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
    except (zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # of a module that is imported where it is needed
            raise
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error


def _open_zstd(path: Path) -> BinaryIO:
    """Open a file of any number of frames, as several writers leave them one behind another."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        try:
            from backports import zstd
        except ImportError as error:
            raise ValueError(f"{path} is read by: pip install backports.zstd") from error
    return cast(BinaryIO, zstd.ZstdFile(path))


def _open_zip(path: Path) -> BinaryIO:
    archive = zipfile.ZipFile(path)
    names = [one for one in archive.namelist() if not one.endswith("/")]
    if len(names) != 1:
        raise ValueError(f"{path} holds {len(names)} files, not one; unpack it and name its folder")
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, archive.open(names[0]))))


OPENERS: Mapping[str, Callable[[Path], Any]] = MappingProxyType(
    {
        ".gz": gzip.GzipFile,
        ".bz2": bz2.BZ2File,
        ".xz": lzma.LZMAFile,
        ".zst": _open_zstd,
        ".zstd": _open_zstd,
        ".zip": _open_zip,
    }
)
