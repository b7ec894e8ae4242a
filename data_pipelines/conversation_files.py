"""Conversations in files and data sets -> samples: JSON, JSON lines, csv, parquet, the Hub.

They go through shards, so that any of them is shuffled, dealt to processes and resumed as all data
is. Where files lie here, nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from data_pipelines.conversations import Message, messages_of
from data_pipelines.problems import read_rows
from data_pipelines.shards import Sample
from data_pipelines.source import BROKEN_CONTENT
from data_pipelines.stream import Broken, Tally, one_line
from mmdlm.layouts.conversation import IMAGE
from mmdlm.layouts.words import shortened
from mmdlm.vision.image_files import image_format, open_image, to_rgb

Row = Mapping[str, Any]
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # what shards keep as it is
FILES = (".json", ".jsonl", ".csv", ".parquet")
TEXTS = ("messages", "conversations")
PICTURES = ("images", "image")


@dataclass(frozen=True)
class Columns:
    """Where a row has its conversation.

    prompt, completion  columns, or templates over columns ("{question} Think first.",
                        "{steps[0]} So: {answer}") that make a question and its answer; both None:
                        messages, conversations, or prompt and completion as the row has them
    system              first message of rows that are made of prompt and completion
    images              folder that paths of pictures begin in
    picture             the mark of a picture in a text
    """

    prompt: str | None = None
    completion: str | None = None
    system: str = ""
    images: Path | None = None
    picture: str = IMAGE

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("name both prompt and completion, or neither of them")

    def check(self, row: Row, *, source: str) -> None:
        """Raise ValueError that names the columns of a data set without a conversation."""
        has = f"{source} has the columns {', '.join(row)}"
        if self.prompt is None or self.completion is None:
            if {"prompt", "completion"} <= set(row) or any(name in row for name in TEXTS):
                return
            raise ValueError(
                f"{has}: no messages, no conversations, and no prompt with its completion; name "
                "columns with --prompt and --completion"
            )
        for name in (self.prompt, self.completion):
            try:
                _filled(name, row)
            except (KeyError, IndexError, AttributeError, TypeError) as error:
                raise ValueError(f"{has}, of which {name!r} cannot be made ({error!r})") from None
            except ValueError as error:
                raise ValueError(f"{name!r} is no template: {error}") from None

    def sample(self, row: Row, key: str) -> Sample:
        """A row as a sample: json, and its pictures; ValueError where they do not fit together."""
        content: dict[str, Any]
        if self.prompt is None or self.completion is None:
            content = {name: row[name] for name in (*TEXTS, "prompt", "completion") if name in row}
        else:
            sides = {"prompt": self.prompt, "completion": self.completion}
            try:
                content = {name: _filled(side, row) for name, side in sides.items()}
            except (KeyError, IndexError, AttributeError, TypeError) as error:
                raise ValueError(f"its prompt or completion cannot be made ({error!r})") from None
            if self.system:
                asked = {"role": "user", "content": content["prompt"]}
                content["prompt"] = [{"role": "system", "content": self.system}, asked]
        messages = messages_of(content, picture=self.picture)
        return packed(
            {"messages": messages},
            pictures_of(content, row),
            key,
            images=self.images,
            mark=self.picture,
        )


def packed(
    said: Mapping[str, list[Message]],
    pictures: list[Any],
    key: str,
    *,
    images: Path | None,
    mark: str,
) -> Sample:
    """Messages by name, and the pictures that they mention in this order -> json and picture files.

    images  folder that paths of pictures begin in
    mark    of a picture in a text

    Raises ValueError where they do not fit together.
    """
    marks = sum(message.text.count(mark) for part in said.values() for message in part)
    if marks != len(pictures):
        raise ValueError(
            f"its messages mention {marks} pictures by {mark!r}, but it has {len(pictures)}"
        )
    sample: Sample = {"__key__": key}
    for number, picture in enumerate(pictures):
        data, extension = _picture_file(picture, images)
        sample[extension if len(pictures) == 1 else f"{number}.{extension}"] = data
    content = {
        name: [{"role": one.role, "content": one.text} for one in part]
        for name, part in said.items()
    }
    sample["json"] = json.dumps(content, ensure_ascii=False).encode()
    return sample


def pictures_of(content: Mapping[str, Any], row: Row) -> list[Any]:
    """What a row has of pictures: in the messages of its conversation, and beside them."""
    return [*_of_messages(content), *_listed(row)]


def _picture_file(given: Any, images: Path | None) -> tuple[bytes, str]:
    """A picture in any form -> (file, extension); what is decoded already becomes PNG."""
    if isinstance(given, Mapping):  # of datasets, undecoded
        given = given.get("bytes") or given.get("path")
    if isinstance(given, str):
        if given.startswith(("http://", "https://", "data:")):
            raise ValueError(f"its picture {shortened(given)} is no file; download it first")
        given = ((images or Path()) / given).read_bytes()
    if isinstance(given, bytes):
        if extension := EXTENSIONS.get(image_format(given)):
            return given, extension
        given = open_image(given, whole=True)
    if not isinstance(given, Image.Image):
        raise ValueError(f"its picture is neither file nor path but {type(given).__name__}")
    file = io.BytesIO()
    to_rgb(given).save(file, format="PNG")
    return file.getvalue(), "png"


class Reading(Protocol):
    """How rows become samples."""

    def check(self, row: Row, *, source: str) -> None:
        """Raise ValueError that names the columns of a data set of which none can be made."""

    def sample(self, row: Row, key: str) -> Sample:
        """A row as a sample; one of BROKEN_CONTENT where it cannot be used."""
        ...


def conversation_samples(
    rows: Iterable[Row], columns: Reading, *, source: str, tally: Tally
) -> Iterator[Sample]:
    """Rows -> samples; what cannot be used is counted and left out.

    Raises ValueError for a data set without the columns, and past the share that `tally` allows.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{source} is empty")
    columns.check(first, source=source)
    for number, row in enumerate(chain([first], rows)):
        key = f"{number:09d}"
        try:
            sample = columns.sample(row, key)
        except BROKEN_CONTENT as error:
            tally.add_broken(Broken(source, key, one_line(error)))
            continue
        tally.good += 1
        yield sample


def rows_of(source: str, *, split: str = "train", subset: str | None = None) -> Iterator[Row]:
    """The rows of a .json, .jsonl, .csv or .parquet file, a folder of them, or a Hub data set.

    Raises ValueError, with the file and the line, for what cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in FILES)
        if not files:
            raise ValueError(f"{source}: none of {', '.join(FILES)} in this folder")
        return chain.from_iterable(_rows_of_file(file) for file in files)
    if path.is_file():
        return _rows_of_file(path)
    if path.suffix or path.is_absolute() or source.count("/") > 1:
        raise ValueError(f"{source}: no such file; correct the path")
    return _streamed(source, subset, split=split)


def _rows_of_file(path: Path) -> Iterator[Row]:
    match path.suffix:
        case ".parquet":
            yield from _streamed("parquet", split="train", data_files=str(path))
        case ".csv":
            yield from (row.values for row in read_rows(path))
        case ".jsonl":
            with open(path, encoding="utf-8-sig") as lines:
                for number, line in enumerate(_decoded(lines, path), start=1):
                    if line.strip():
                        yield _object(line, f"{path}, line {number}")
        case ".json":
            yield from _entries(path)
        case _:
            raise ValueError(f"{path}: conversations are read from .json, .jsonl, .csv, .parquet")


def _decoded(lines: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text in UTF-8 (byte {error.start} of a block)") from None


def _entries(path: Path) -> Iterator[Row]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: no list of conversations but {type(entries).__name__}")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, entry {number}: no object but {shortened(repr(entry))}")
        yield entry


def _object(line: str, place: str) -> Row:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: no JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: no object but {shortened(line)}")
    return entry


def _streamed(name: str, *arguments: Any, **options: Any) -> Iterator[Row]:
    """Rows of a data set of the `datasets` library, with pictures as the files that they are."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{options.get('data_files', name)} is read by datasets: pip install datasets"
        ) from error
    try:
        rows = load_dataset(name, *arguments, streaming=True, **options).decode(False)
        yield from rows
    except (OSError, RuntimeError, ValueError) as error:
        place = options.get("data_files", name)
        raise ValueError(f"data set {place} cannot be read ({one_line(error)})") from error


def _filled(template: str, row: Row) -> str:
    """A column, or a template over columns; KeyError, IndexError ... where the row lacks them."""
    value = _TEXT.vformat(template, (), row) if "{" in template else row[template]
    if not isinstance(value, str):
        raise TypeError(f"{template} is no text but {type(value).__name__}")
    return value


class _Text(string.Formatter):
    """Templates whose fields are texts or numbers: None or a list would be learnt as its repr."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if not isinstance(value, str | int | float):
            raise TypeError(f"a field of the template is no text but {type(value).__name__}")
        return str(super().format_field(value, format_spec))


_TEXT = _Text()


def _of_messages(content: Mapping[str, Any]) -> Iterator[Any]:
    """Pictures that stand in the pieces of messages themselves."""
    for side in content.values():
        for message in side if isinstance(side, list) else []:
            pieces = message.get("content") if isinstance(message, Mapping) else None
            for piece in pieces if isinstance(pieces, list) else []:
                given = piece.get("image") or piece.get("path")
                if given is not None:
                    yield given


def _listed(row: Row) -> list[Any]:
    """Pictures beside the messages."""
    for name in PICTURES:
        if row.get(name) is not None:
            given = row[name]
            return list(given) if isinstance(given, list | tuple) else [given]
    return []
