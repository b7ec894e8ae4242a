"""Rows of documents with images between their texts -> samples: OBELICS, MMC4, marks in a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipelines.jobs.report import Report
from data_pipelines.shards.sample_stats import one_line
from data_pipelines.shards.shards import Sample
from data_pipelines.sources.local_files import MissingFile
from data_pipelines.sources.row_files import BrokenRow, Row
from data_pipelines.sources.row_images import Images
from data_pipelines.sources.source import BROKEN_CONTENT
from data_pipelines.sources.text_files import json_bytes

Piece = str | list[Any]  # a text, or what names one image: the first that is here is taken
FORMS = "texts with images (OBELICS), text_list with image_info (MMC4), or text with images"


def pieces_of(values: Mapping[str, Any], *, mark: str) -> list[Piece]:
    """Return the texts and images of a document, in reading order.

    Of MMC4, an image stands before the sentence that it matches, as OpenFlamingo reads it; two of
    one sentence in the order of the row.

    Source: arXiv:2306.16527 (OBELICS), arXiv:2304.06939 (MMC4), arXiv:2308.01390 (OpenFlamingo).

    Raises ValueError: the row has none of the forms.
    """
    texts, images = values.get("texts"), values.get("images")
    sentences, infos = values.get("text_list"), values.get("image_info")
    if isinstance(texts, list) and isinstance(images, list):
        if len(texts) != len(images):
            raise ValueError(f"it has {len(texts)} texts but {len(images)} images, None included")
        places = zip(texts, images, strict=True)
        return [_piece(text, image) for text, image in places if text or image is not None]
    if isinstance(sentences, list) and isinstance(infos, list):
        before: dict[int, list[Piece]] = {}
        for info in infos:
            place = info.get("matched_text_index") if isinstance(info, Mapping) else None
            if not isinstance(place, int) or not 0 <= place < len(sentences):
                raise ValueError(f"an image matches sentence {place!r} of {len(sentences)}")
            names = [info.get("image_name"), info.get("raw_url")]
            before.setdefault(place, []).append([name for name in names if name])
        if wrong := [one for one in sentences if not isinstance(one, str)]:
            raise ValueError(f"a sentence is no text but {type(wrong[0]).__name__}")
        return [one for n, text in enumerate(sentences) for one in (*before.get(n, ()), text)]
    text = values.get("text")
    if isinstance(text, str) and isinstance(images, list):
        first, *others = text.split(mark)
        if len(others) != len(images):
            raise ValueError(
                f"its text mentions {len(others)} images by {mark!r}, but it has {len(images)}"
            )
        pairs = zip(images, others, strict=True)
        found = [first, *(one for image, text in pairs for one in ([image], text))]
        return [one for one in found if one != ""]
    raise ValueError(f"it is none of {FORMS}")


def _piece(text: Any, image: Any) -> Piece:
    if text and image is not None:
        raise ValueError("a text and an image stand in one place")
    if image is not None:
        return [image]
    if not isinstance(text, str):
        raise ValueError(f"a text is no text but {type(text).__name__}")
    return text


@dataclass(frozen=True)
class InterleavedRows:
    """How a document with images becomes a sample.

    Attributes:
        images: How an image is read.
    """

    images: Images = Images()

    def sample(self, row: Row, key: str, report: Report) -> Sample | None:
        """Return a document as a sample: json with its pieces, and its images by their numbers.

        An image that is not here, or is damaged, leaves its document, which the report counts; a
        document that has lost all of its images is left out, and None is returned.

        Raises ValueError: the row is no such document.
        """
        content: list[dict[str, str]] = []
        files: list[tuple[str, bytes]] = []
        lost = 0
        for piece in pieces_of(row.values, mark=self.images.mark):
            if isinstance(piece, str):
                content.append({"type": "text", "text": piece})
                continue
            try:
                data, extension, is_new = self._read(piece)
            except BROKEN_CONTENT as error:
                report.change(row.where, f"an image of it is left out: {one_line(error)}")
                lost += 1
                continue
            if is_new:
                report.change(row.where, "an image of another format is stored as PNG")
            content.append({"type": "image"})
            files.append((extension, data))
        if lost and not files:
            report.leave_out(row.where, "none of its images is here")
            return None
        if not content:
            report.leave_out(row.where, "it is empty")
            return None
        names = [end if len(files) == 1 else f"{n}.{end}" for n, (end, _) in enumerate(files)]
        images = dict(zip(names, (data for _, data in files), strict=True))
        return {"__key__": key, **images, "json": json_bytes({"content": content})}

    def _read(self, names: list[Any]) -> tuple[bytes, str, bool]:
        missing = MissingFile("no name of an image")
        for name in names:
            try:
                return self.images.read(name)
            except MissingFile as error:
                missing = error
        raise missing


def interleaved_samples(
    rows: Iterable[Row | BrokenRow], columns: InterleavedRows, *, source: str, report: Report
) -> Iterator[Sample]:
    """Yield documents as samples; what cannot be used is counted and left out.

    Raises ValueError: the first row is of no known form, there is none, or too many are broken.
    """
    for number, row in enumerate(rows):
        report.read += 1
        if isinstance(row, BrokenRow):
            report.add_broken(row.where, row.reason)
            continue
        if number == 0 and not _is_known(row.values):
            raise ValueError(f"{source} has the columns {', '.join(row.values)}, but not {FORMS}")
        try:
            sample = columns.sample(row, f"{number:09d}", report)
        except BROKEN_CONTENT as error:
            report.add_broken(row.where, one_line(error))
            continue
        if sample is not None:
            yield sample
    if not report.read:
        raise ValueError(f"{source} is empty")


def _is_known(values: Mapping[str, Any]) -> bool:
    forms = ({"texts", "images"}, {"text_list", "image_info"}, {"text", "images"})
    return any(form <= values.keys() for form in forms)
