"""Text that others wrote, and its JSON: byte order marks, line ends, and what is no text.

All text of files and shards is read here, so that one caption is the same tokens whichever editor
saved it. UTF-8 is read with and without its mark, UTF-16 and UTF-32 with theirs.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from data_pipelines.sources.compressed import open_binary

MARKS = (  # that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


def decoded(data: bytes) -> str:
    """Return the text of a file or field, without its byte order mark, lines ended by a newline.

    Raises ValueError where it is no text.
    """
    encoding = _encoding(data[:4])
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(_no_text(encoding, error.start)) from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_text(path: Path) -> str:
    """Return the text of a file; ValueError, OSError where it has none."""
    with open_binary(path) as file:
        text = decoded(file.read())
    if "\0" in text:
        raise ValueError("no text: it holds zero bytes, as UTF-16 without its mark does")
    return text


def open_text(path: Path, *, newline: str | None = None) -> TextIO:
    """Open a file whose text is read line by line; `checked` says of each line whether it is text.

    Args:
        path: The file.
        newline: As `open` takes it.

    Returns:
        The file, in the encoding that its first bytes tell.
    """
    with open_binary(path) as file:
        encoding = _encoding(file.read(4))
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    return io.TextIOWrapper(open_binary(path), encoding, errors, newline)


def checked(text: str) -> str:
    """Return the text without a byte order mark; ValueError where UTF-8 cannot say it.

    That is a byte which was no text, as `open_text` hands it on, or half of a character.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            raise ValueError(_no_text("utf-8-sig", error.start)) from None
        raise ValueError(
            f"half of a character (\\u{code:04x}) at {error.start}: the text was cut in the middle "
            "of an emoji"
        ) from None
    return text.removeprefix(BOM)  # also of a file that was appended to another


def parsed(data: bytes | str) -> Any:
    """Return the value of a JSON text; ValueError where it is none, or cannot be written again."""
    text = checked(data if isinstance(data, str) else decoded(data))
    value = json_value(text)
    check_halves(value, text)
    return value


def json_value(text: str) -> Any:
    """Return what `json.loads` does; ValueError for all that it refuses."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("no JSON that can be read: its brackets are nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error})") from None


def check_halves(value: Any, text: str) -> None:
    """Raise ValueError where a value of the JSON `text` holds half of a character."""
    if "\\ud" in text or "\\uD" in text:  # JSON writes them so
        checked(json.dumps(value, ensure_ascii=False))


def json_bytes(value: object) -> bytes:
    """Return JSON in UTF-8, as fields of samples hold it."""
    return json.dumps(value, ensure_ascii=False).encode()


def as_json(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the columns that JSON holds, and the names of those that hold anything else."""
    kept, unread = {}, []
    for name, value in values.items():
        try:
            json_bytes(value)
        except TypeError:
            unread.append(name)
        else:
            kept[name] = value
    return kept, unread


def _encoding(start: bytes) -> str:
    return next((name for mark, name in MARKS if start.startswith(mark)), "utf-8-sig")


def _no_text(encoding: str, place: int) -> str:
    name = encoding.removesuffix("-sig").upper()
    return f"no text in {name} (at {place}); save it as UTF-8"
