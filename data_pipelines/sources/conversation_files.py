"""Conversations in rows of files and data sets -> samples.

They go through shards, so that any of them is shuffled, dealt to processes and resumed as all data
is. Where files lie here, nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from data_pipelines.jobs.report import Report
from data_pipelines.shards.sample_stats import one_line
from data_pipelines.shards.shards import Sample
from data_pipelines.sources.column_templates import columns_in, filled
from data_pipelines.sources.messages import (
    MESSAGE_KEYS,
    SYSTEMS,
    Message,
    all_messages,
    given_messages,
    up_to_answer,
)
from data_pipelines.sources.row_files import BrokenRow, Row
from data_pipelines.sources.row_images import Images, image_in
from data_pipelines.sources.source import BROKEN_CONTENT
from data_pipelines.sources.text_files import json_bytes
from data_pipelines.sources.tools import TOOLS, offered, uses_tools
from mmdlm.templates.conversation import ASSISTANT, SYSTEM, USER

TEXTS = ("messages", "conversations")
IMAGES = ("images", "image")


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
            own = {*columns_in(self.prompt), *columns_in(self.completion)}
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
                filled(name, row.values)
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
            names = (*TEXTS, "prompt", "completion", *TOOLS)
            content = {name: values[name] for name in names if name in values}
            shown = set()
        else:
            sides = {"prompt": self.prompt, "completion": self.completion}
            try:
                content = {name: filled(side, values) for name, side in sides.items()}
            except (KeyError, IndexError, AttributeError, TypeError) as error:
                raise ValueError(f"its prompt or completion cannot be made ({error!r})") from None
            shown = {*columns_in(self.prompt), *columns_in(self.completion)}
        said = {name: values[name] for name in SYSTEMS if values.get(name) and name not in shown}
        content |= said or {SYSTEMS[0]: self.system}
        every = all_messages(content, image=self.images.mark)
        if uses_tools(content, given_messages(content)):
            report.change(row.where, "its tools, their calls and results are written as text")
        every = _from_question(every, self.images.mark, row.where, report)
        messages = up_to_answer(every)
        sample = packed(
            {"messages": messages},
            images_of(content, values),
            key,
            self.images,
            where=row.where,
            report=report,
        )
        if after_answer := len(every) - len(messages):
            report.change(row.where, f"{after_answer} messages behind its last answer are left out")
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
    if mentioned and not marks and (placed := _images_first(said, len(mentioned) * images.mark)):
        said, marks = placed, len(mentioned)
        report.change(where, "its messages do not say where its images are; they come first")
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


def _images_first(said: Mapping[str, list[Message]], marks: str) -> dict[str, list[Message]] | None:
    """Return messages of which the first of the user begins with images; None where there is none.

    That is where TRL's `prepare_multimodal_messages` puts images that no message mentions.
    """
    for name, part in said.items():
        for number, message in enumerate(part):
            if message.role == USER:
                first = replace(message, text=marks + message.text)
                return {**said, name: [*part[:number], first, *part[number + 1 :]]}
    return None


def _from_question(messages: list[Message], mark: str, where: str, report: Report) -> list[Message]:
    """Return a conversation without the answers that it begins with, as cut ones of ShareGPT do."""
    start = next((n for n, one in enumerate(messages) if one.role == SYSTEM), -1) + 1
    after_answer = next(
        (n for n, one in enumerate(messages) if n >= start and one.role != ASSISTANT), 0
    )
    cut = messages[start:after_answer]
    if start > 1 or not cut or any(mark in one.text for one in cut):
        return messages
    report.change(where, "it begins with an answer, which is left out")
    return [*messages[:start], *messages[after_answer:]]


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
    if offered(values):
        found -= {*TOOLS}
    for column in used - {*IMAGES}:
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


def _of_messages(content: Mapping[str, Any]) -> Iterator[Any]:
    """Images that stand in the pieces of messages themselves."""
    for side in content.values():
        for message in side if isinstance(side, list) else []:
            pieces = message.get("content") if isinstance(message, Mapping) else None
            for piece in pieces if isinstance(pieces, list) else []:
                if (given := image_in(piece)) is not None:
                    yield given


def _listed(row: Mapping[str, Any]) -> list[Any]:
    """Images beside the messages."""
    for name in IMAGES:
        if row.get(name) is not None:
            given = row[name]
            return list(given) if isinstance(given, list | tuple) else [given]
    return []
