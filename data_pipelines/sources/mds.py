"""Rows of MDS, the shards of MosaicML's streaming: index.json, and .mds files beside it.

The library itself is not needed, and pickled columns, which could run code, are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.sources.compressed import OPENERS, damage_named, open_binary
from data_pipelines.sources.local_files import path_inside
from data_pipelines.sources.row_files import BrokenRow, Row
from data_pipelines.sources.text_files import decoded, parsed, read_text

INDEX = "index.json"
SIZES = {"uint": (8, 16, 32, 64), "int": (8, 16, 32, 64), "float": (16, 32, 64)}
# of a pixel, by mode of Pillow
BITS = {"1": 1, "L": 8, "P": 8, "LA": 16, "I;16": 16, "RGB": 24, "YCbCr": 24, "LAB": 24, "HSV": 24}
BITS |= {"RGBA": 32, "RGBa": 32, "RGBX": 32, "CMYK": 32, "I": 32, "F": 32, "PA": 16, "La": 16}
SCALARS = frozenset(f"{kind}{bits}" for kind, sizes in SIZES.items() for bits in sizes)


@dataclass(frozen=True)
class Unread:
    """The value of a column whose encoding is not read, such as `ndarray` or `pkl`."""

    encoding: str


def mds_shards(folder: Path) -> list[dict[str, Any]] | None:
    """Return what the index of a folder says of its shards; None where it holds no MDS."""
    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        content = parsed(read_text(index))
    except ValueError:
        return None
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, list) or not all(isinstance(one, dict) for one in shards):
        return None
    return shards if shards and all(one.get("format") == "mds" for one in shards) else None


def mds_files(folder: Path, shards: list[dict[str, Any]]) -> list[Path]:
    """Return the files of shards, the uncompressed one where there are both.

    Raises ValueError: a file is missing.
    """
    found = []
    for shard in shards:
        names = [
            one["basename"]
            for one in (shard.get("raw_data"), shard.get("zip_data"))
            if isinstance(one, dict) and isinstance(one.get("basename"), str)
        ]
        # Where the index of several folders says, or else beside the index.
        paths = [path_inside(folder, name, allow_outside=False) for name in names]
        paths += [folder / Path(name).name for name in names]
        path = next((one for one in paths if one.is_file()), None)
        if path is None:
            raise ValueError(f"{folder / INDEX} names {' or '.join(names)}, which is not there")
        if path in found:
            raise ValueError(f"{folder / INDEX} names {path} twice; fetch it again")
        found.append(path)
    return found


def mds_rows(folder: Path, shards: list[dict[str, Any]]) -> Iterator[Row | BrokenRow]:
    """Yield the rows of all shards; images stay the files that they are.

    Raises ValueError: a shard is missing, damaged or compressed otherwise than by OPENERS.
    """
    for shard, path in zip(shards, mds_files(folder, shards), strict=True):
        if path.suffix != ".mds" and path.suffix not in OPENERS:
            known = ", ".join(sorted(OPENERS))
            raise ValueError(f"{path} is compressed by none of {known}; decompress it")
        with damage_named(path), open_binary(path) as file:
            data = file.read()
        yield from _rows(path, shard, data)


def _rows(path: Path, shard: Mapping[str, Any], data: bytes) -> Iterator[Row | BrokenRow]:
    try:
        columns = list(
            zip(
                shard["column_names"],
                shard["column_encodings"],
                shard["column_sizes"],
                strict=True,
            )
        )
        count, size = int(shard["samples"]), int(shard["raw_data"]["bytes"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.parent / INDEX} is damaged ({error!r}); fetch it again") from None
    if len(data) != size:
        raise ValueError(f"{path} has {len(data)} bytes, not {size}; fetch it again")
    # The header: the number of samples, and where each begins and the last one ends.
    heads = np.frombuffer(data[: 4 * (count + 2)], "<u4").astype(int).tolist()
    fits = len(heads) == count + 2 and (heads[0], heads[-1]) == (count, size)
    if not fits or sorted(heads[1:]) != heads[1:]:
        raise ValueError(f"{path} is damaged: its header does not fit; fetch it again")
    for number in range(count):
        where = f"{path}, sample {number}"
        try:
            yield Row(_values(columns, data[heads[number + 1] : heads[number + 2]]), where)
        except (ValueError, TypeError, IndexError) as error:
            yield BrokenRow(where, f"it cannot be decoded ({error})")


def _values(columns: list[tuple[str, str, int | None]], data: bytes) -> dict[str, Any]:
    """Decode one sample: the sizes of columns of any size, then all values."""
    own = sum(size is None for _, _, size in columns)
    rest = iter(np.frombuffer(data[: 4 * own], "<u4").astype(int).tolist())
    place = 4 * own
    values = {}
    for name, encoding, fixed in columns:
        size = next(rest) if fixed is None else fixed
        if place + size > len(data):
            raise ValueError(f"column {name!r} ends behind its sample")
        values[name] = _decoded(encoding, data[place : place + size])
        place += size
    if place != len(data):
        raise ValueError(f"{len(data) - place} bytes are left behind its columns")
    return values


def _decoded(encoding: str, data: bytes) -> Any:
    if encoding in SCALARS:
        return np.frombuffer(data, np.dtype(encoding).newbyteorder("<"))[0].item()
    if encoding.startswith("list[") and (decode := DECODERS.get(encoding[5:-1])):
        count = int.from_bytes(data[:4], "little")
        ends = 4 + 4 * count + np.cumsum(np.frombuffer(data[4 : 4 + 4 * count], "<u4")).astype(int)
        if len(ends) != count or (ends[-1] if count else 4) != len(data):
            raise ValueError("a list does not fit its column")
        starts = [4 + 4 * count, *ends.tolist()]
        return [decode(data[a:b]) for a, b in zip(starts, ends.tolist(), strict=False)]
    decode = DECODERS.get(encoding)
    return Unread(encoding) if decode is None else decode(data)


def _pil(data: bytes) -> Image.Image:
    """Decode an image of raw pixels behind its width, height, and mode with the size of that."""
    width, height, size = np.frombuffer(data[:12], "<u4").astype(int).tolist()
    mode, pixels = data[12 : 12 + size].decode(), data[12 + size :]
    if mode not in BITS:
        raise ValueError(f"an image of mode {mode[:20]!r}")
    if not (width and height) or len(pixels) != (width * BITS[mode] + 7) // 8 * height:
        raise ValueError(f"{len(pixels)} bytes are no {mode} image of {width}x{height} pixels")
    return Image.frombytes(mode, (width, height), pixels)


DECODERS: Mapping[str, Callable[[bytes], Any]] = MappingProxyType(
    {
        "bytes": bytes,
        "jpeg": bytes,
        "png": bytes,
        "str": decoded,
        "json": parsed,
        "int": lambda data: int.from_bytes(data, "little", signed=True),
        "str_int": lambda data: int(data),
        "str_float": lambda data: float(data),
        "str_decimal": lambda data: data.decode(),
        "pil": _pil,
    }
)
