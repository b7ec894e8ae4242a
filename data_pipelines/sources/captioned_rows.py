"""Rows with an image and a text -> samples, as for `data_pipelines.sources.image_text`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data_pipelines.jobs.report import Report
from data_pipelines.shards.sample_stats import one_line
from data_pipelines.shards.shards import Sample
from data_pipelines.sources.column_templates import columns_in, filled
from data_pipelines.sources.folder import TEXT_COLUMNS, captions_of
from data_pipelines.sources.row_files import BrokenRow, Row
from data_pipelines.sources.row_images import Images, image_in
from data_pipelines.sources.source import BROKEN_CONTENT
from data_pipelines.sources.text_files import as_json, json_bytes

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "image_path", "file_name")


@dataclass(frozen=True)
class CaptionedRows:
    """Where a row has its image and its text.

    Attributes:
        image: Column; None: the first of `IMAGE_COLUMNS` that is there.
        text: Column, or a template over columns; None: the first of `TEXT_COLUMNS`.
        images: How an image is read.
    """

    image: str | None = None
    text: str | None = None
    images: Images = Images()

    def for_columns(self, row: Row, *, source: str) -> CaptionedRows:
        """Return the same with both columns named.

        Raises ValueError: a data set with the columns of this row lacks one of them.
        """
        image = self.image or next((one for one in IMAGE_COLUMNS if one in row.values), None)
        text = self.text or next((one for one in TEXT_COLUMNS if one in row.values), None)
        has = f"{source} has the columns {', '.join(row.values)}"
        if image is None or image not in row.values:
            listed = f"none of {', '.join(IMAGE_COLUMNS)}" if image is None else f"no {image!r}"
            raise ValueError(f"{has}: {listed}; name the one with the images with --image")
        if text is None or not columns_in(text) <= row.values.keys():
            listed = f"none of {', '.join(TEXT_COLUMNS)}" if text is None else f"no {text!r}"
            raise ValueError(f"{has}: {listed}; name the one with the captions with --text")
        return CaptionedRows(image, text, self.images)

    def sample(self, row: Row, key: str, report: Report) -> Sample | None:
        """Return a row as a sample: its image, txt, and json of all other columns.

        A row without image or text is left out: the report says why, and None is returned.

        Raises ValueError: its image or text cannot be read.
        """
        assert self.image is not None
        assert self.text is not None
        if image_in(row[self.image]) in (None, "", b""):
            report.leave_out(row.where, f"no image: its {self.image!r} is empty")
            return None
        try:
            text = filled(self.text, row.values) if "{" in self.text else row[self.text]
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(f"its text cannot be made ({error!r})") from None
        captions = captions_of(text)
        if not captions:
            report.leave_out(row.where, f"no caption: its {self.text!r} is empty")
            return None
        data, extension, is_new = self.images.read(row[self.image])
        if is_new:
            report.change(row.where, "an image of another format is stored as PNG")
        rest, unread = as_json({k: v for k, v in row.values.items() if k != self.image})
        for name in unread:
            report.unused[name] = report.unused.get(name, 0) + 1
        return {
            "__key__": key,
            "__file__": row.where,
            extension: data,
            "txt": captions[0].encode(),
            "json": json_bytes(rest),
        }


def captioned_samples(
    rows: Iterable[Row | BrokenRow], columns: CaptionedRows, *, source: str, report: Report
) -> Iterator[Sample]:
    """Yield rows as samples; what cannot be used is counted and left out.

    Raises ValueError: the data set has no such columns, is empty, or too much of it is broken.
    """
    named: CaptionedRows | None = None
    for number, row in enumerate(rows):
        report.read += 1
        if isinstance(row, BrokenRow):
            report.add_broken(row.where, row.reason)
            continue
        named = named or columns.for_columns(row, source=source)
        try:
            sample = named.sample(row, f"{number:09d}", report)
        except BROKEN_CONTENT as error:
            report.add_broken(row.where, one_line(error))
            continue
        if sample is not None:
            yield sample
    if not report.read:
        raise ValueError(f"{source} is empty")
