"""Conversations in files and data sets -> samples: JSON, JSON lines, csv, parquet, the Hub.

They go through shards, so that any of them is shuffled, dealt to processes and resumed as all data
is. Where files lie here, nothing is downloaded.
"""

from __future__ import annotations

import io
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from data_pipelines.jobs.report import Report
from data_pipelines.shards.sample_stats import one_line
from data_pipelines.shards.shards import Sample
from data_pipelines.sources.folder import file_inside, files_below
from data_pipelines.sources.messages import (
    MESSAGE_KEYS,
    SYSTEMS,
    Message,
    all_messages,
    up_to_answer,
)
from data_pipelines.sources.row_files import ROW_FILES, BrokenRow, Row, rows_in
from data_pipelines.sources.source import BROKEN_CONTENT
from data_pipelines.sources.text_files import json_bytes
from mmdlm.templates.conversation import IMAGE
from mmdlm.templates.infill import shortened
from mmdlm.vision.image_files import image_format, open_image, to_rgb

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # what shards keep as it is
FILES = (*ROW_FILES, ".parquet")
TEXTS = ("messages", "conversations")
IMAGES = ("images", "image")


@dataclass(frozen=True)
class Images:
    """Where a row has its images.

    Attributes:
        folder: That their paths begin in.
        mark: Of an image in a text.
        allow_outside: Whether a path may lead out of the folder.
    """

    folder: Path | None = None
    mark: str = IMAGE
    allow_outside: bool = False

    def read(self, given: Any) -> tuple[bytes, str, bool]:
        """Return an image in any form as (file, extension, whether the file is another than given).

        What shards do not hold as it is, and what is decoded already, becomes PNG.
        """
        if isinstance(given, Mapping):  # of datasets, undecoded
            given = given.get("bytes") or given.get("path")
        if isinstance(given, str):
            if given.startswith(("http://", "https://", "data:")):
                raise ValueError(f"its image {shortened(given)!r} is no file; download it first")
            path = file_inside(self.folder or Path(), given, allow_outside=self.allow_outside)
            given = path.read_bytes()
        if isinstance(given, bytes):
            if extension := EXTENSIONS.get(image_format(given)):
                return given, extension, False
            given = open_image(given, whole=True)
        if not isinstance(given, Image.Image):
            raise ValueError(f"its image is neither file nor path but {type(given).__name__}")
        file = io.BytesIO()
        to_rgb(given).save(file, format="PNG")
        return file.getvalue(), "png", True


@dataclass(frozen=True)
class Columns:
    """Where a row has its conversation.

    Attributes:
        prompt: Columns, or templates over columns ("{question} Think first.", "{steps[0]} So:
            {answer}") that make a question and its answer; both None: messages, conversations, or
            prompt and completion as the row has them.
        completion: Columns, or templates over columns ("{question} Think first.", "{steps[0]} So:
            {answer}") that make a question and its answer; both None: messages, conversations, or
            prompt and completion as the row has them.
        system: First message of rows that have none, in their messages or in a column.
    """

    prompt: str | None = None
    completion: str | None = None
    system: str = ""
    images: Images = Images()

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("name both prompt and completion, or neither of them")

    @property
    def used(self) -> frozenset[str]:
        """The columns that a sample is made of."""
        own = {"prompt", "completion", *TEXTS}
        if self.prompt is not None and self.completion is not None:
            own = {*_columns_in(self.prompt), *_columns_in(self.completion)}
        return frozenset({*own, *IMAGES})

    def check(self, row: Row, *, source: str) -> None:
        """Raise ValueError that names the columns of a data set without a conversation."""
        has = f"{source} has the columns {', '.join(row.values)}"
        if self.prompt is None or self.completion is None:
            known = set(row.values)
            if {"prompt", "completion"} <= known or any(name in known for name in TEXTS):
                return
            raise ValueError(
                f"{has}: no messages, no conversations, and no prompt with its completion; name "
                "columns with --prompt and --completion"
            )
        for name in (self.prompt, self.completion):
            try:
                _filled(name, row.values)
            except (KeyError, IndexError, AttributeError, TypeError) as error:
                raise ValueError(f"{has}, of which {name!r} cannot be made ({error!r})") from None
            except ValueError as error:
                raise ValueError(f"{name!r} is no template: {error}") from None

    def sample(self, row: Row, key: str, report: Report) -> Sample:
        """Return a row as a sample, json and its images; ValueError where they do not fit."""
        values = row.values
        content: dict[str, Any]
        shown: set[str]
        if self.prompt is None or self.completion is None:
            names = (*TEXTS, "prompt", "completion")
            content = {name: values[name] for name in names if name in values}
            shown = set()
        else:
            sides = {"prompt": self.prompt, "completion": self.completion}
            try:
                content = {name: _filled(side, values) for name, side in sides.items()}
            except (KeyError, IndexError, AttributeError, TypeError) as error:
                raise ValueError(f"its prompt or completion cannot be made ({error!r})") from None
            shown = {*_columns_in(self.prompt), *_columns_in(self.completion)}
        said = {name: values[name] for name in SYSTEMS if values.get(name) and name not in shown}
        content |= said or {SYSTEMS[0]: self.system}
        every = all_messages(content, image=self.images.mark)
        messages = up_to_answer(every)
        sample = packed(
            {"messages": messages},
            images_of(content, values),
            key,
            self.images,
            where=row.where,
            report=report,
        )
        if behind := len(every) - len(messages):
            report.change(row.where, f"{behind} messages behind its last answer are left out")
        return sample


def packed(
    said: Mapping[str, list[Message]],
    mentioned: list[Any],
    key: str,
    images: Images,
    *,
    where: str,
    report: Report,
) -> Sample:
    """Return a sample of messages by name: its json, and the images that they mention.

    Args:
        said: Messages by name.
        mentioned: Images, in the order in which the messages mention them.
        key: Of the sample.
        images: Reads and encodes an image.
        where: Names the sample in a report.
        report: Counts the images that are changed.

    Returns:
        The sample, images as files beside the json.

    Raises:
        ValueError: Where they do not fit together.
    """
    marks = sum(message.text.count(images.mark) for part in said.values() for message in part)
    if marks != len(mentioned):
        raise ValueError(
            f"its messages mention {marks} images by {images.mark!r}, but it has {len(mentioned)}"
        )
    sample: Sample = {"__key__": key}
    for number, image in enumerate(mentioned):
        data, extension, is_new = images.read(image)
        if is_new:
            report.change(where, "an image of another format is stored as PNG")
        sample[extension if len(mentioned) == 1 else f"{number}.{extension}"] = data
    content = {name: [one.to_dict() for one in part] for name, part in said.items()}
    sample["json"] = json_bytes(content)
    return sample


def images_of(content: Mapping[str, Any], values: Mapping[str, Any]) -> list[Any]:
    """Return the images of a row: in the messages of its conversation, and beside them."""
    return [*_of_messages(content), *_listed(values)]


class Reading(Protocol):
    """How rows become samples."""

    @property
    def used(self) -> frozenset[str]:
        """The columns that a sample is made of."""
        ...

    def check(self, row: Row, *, source: str) -> None:
        """Raise ValueError that names the columns of a data set of which none can be made."""

    def sample(self, row: Row, key: str, report: Report) -> Sample:
        """Return a row as a sample; raise one of BROKEN_CONTENT where it cannot be used.

        What is changed is counted in the report.
        """
        ...


def conversation_samples(
    rows: Iterable[Row | BrokenRow], columns: Reading, *, source: str, report: Report
) -> Iterator[Sample]:
    """Rows -> samples; what cannot be used is counted and left out.

    Raises ValueError for a data set without the columns, and past the share that `report` allows.
    """
    used: frozenset[str] | None = None
    for number, row in enumerate(rows):
        report.read += 1
        if isinstance(row, BrokenRow):
            report.add_broken(row.where, row.reason)
            continue
        if used is None:
            columns.check(row, source=source)
            used = columns.used
        try:
            sample = columns.sample(row, f"{number:09d}", report)
        except BROKEN_CONTENT as error:
            report.add_broken(row.where, one_line(error))
            continue
        for name in _unused(row.values, sample, used):
            report.unused[name] = report.unused.get(name, 0) + 1
        yield sample
    if not report.read:
        raise ValueError(f"{source} is empty")


def _unused(values: Mapping[str, Any], sample: Sample, used: frozenset[str]) -> set[str]:
    """Columns of a row, and keys of its messages, that hold something and are not in its sample."""
    found = {name for name, value in values.items() if name not in used and not _is_nothing(value)}
    found -= {name for name in SYSTEMS if name in found and _is_said(values[name], sample)}
    for column in used:
        messages = values.get(column)
        for message in messages if isinstance(messages, list) else []:
            if isinstance(message, Mapping):
                found |= {
                    f"{column}.{name}"
                    for name, value in message.items()
                    if name not in MESSAGE_KEYS and not _is_nothing(value)
                }
    return found


def _is_said(text: Any, sample: Sample) -> bool:
    return isinstance(text, str) and json_bytes(text.strip())[1:-1] in sample["json"]


def _is_nothing(value: Any) -> bool:
    return value is None or value in ("", [], {})


def local_files(source: str) -> list[Path]:
    """Return the files that a source names; none for a data set of the Hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = files_below(path, FILES)
        if not files:
            raise ValueError(f"{source}: none of {', '.join(FILES)} in this folder")
        return files
    if path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"{path}: conversations are read from {', '.join(FILES)}")
        return [path]
    if path.suffix or path.is_absolute() or source.count("/") > 1:
        raise ValueError(f"{source}: no such file; correct the path")
    return []


def rows_of(
    source: str, *, split: str = "train", subset: str | None = None
) -> Iterator[Row | BrokenRow]:
    """Yield the rows of a .json, .jsonl, .csv or .parquet file, a folder of them, or a Hub set.

    Raises ValueError, with the file, for what cannot be read as a whole.
    """
    if files := local_files(source):
        return chain.from_iterable(map(_rows_of_file, files))
    return _streamed(source, subset, split=split)


def _rows_of_file(path: Path) -> Iterator[Row | BrokenRow]:
    if path.suffix == ".parquet":
        return _streamed("parquet", split="train", data_files=str(path))
    return rows_in(path)


def _streamed(name: str, *arguments: Any, **options: Any) -> Iterator[Row]:
    """Rows of a data set of the `datasets` library, with images as the files that they are."""
    place = options.get("data_files", name)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{place} is read by datasets: pip install datasets") from error
    try:
        rows = load_dataset(name, *arguments, streaming=True, **options).decode(False)
        for number, row in enumerate(rows, 1):
            yield Row(row, f"{place}, row {number}")
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"data set {place} cannot be read ({one_line(error)})") from error


def _columns_in(template: str) -> set[str]:
    """Return the columns that a column name or template needs."""
    if "{" not in template:
        return {template}
    fields = (field for _, field, _, _ in _TEXT.parse(template) if field)
    return {re.split(r"[.\[]", field)[0] for field in fields}


def _filled(template: str, row: Mapping[str, Any]) -> str:
    """Return a column, or a filled template; KeyError, IndexError ... where the row lacks them."""
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
    """Images that stand in the pieces of messages themselves."""
    for side in content.values():
        for message in side if isinstance(side, list) else []:
            pieces = message.get("content") if isinstance(message, Mapping) else None
            for piece in pieces if isinstance(pieces, list) else []:
                given = piece.get("image") or piece.get("path")
                if given is not None:
                    yield given


def _listed(row: Mapping[str, Any]) -> list[Any]:
    """Images beside the messages."""
    for name in IMAGES:
        if row.get(name) is not None:
            given = row[name]
            return list(given) if isinstance(given, list | tuple) else [given]
    return []
