"""Images and captions in the JSON of COCO."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.jobs.report import Report
from data_pipelines.shards.sample_stats import one_line
from data_pipelines.shards.shards import Sample
from data_pipelines.sources.folder import captions_of
from data_pipelines.sources.local_files import file_inside, image_field
from data_pipelines.sources.source import BROKEN_CONTENT
from data_pipelines.sources.text_files import json_bytes, parsed, read_text

Id = int | str


def coco_entries(
    captions: Path, *, report: Report | None = None
) -> list[tuple[Id, str, list[str]]]:
    """Return (id, file name, captions) of each image of a captions file.

    Args:
        captions: The JSON file.
        report: Counts the captions of images that the file does not list.

    Returns:
        Entries in the order of the file.

    Source: the format that cocodataset.org describes, "Data format", sections 1 and 5.
    """
    try:
        content = parsed(read_text(captions))
        texts: dict[str, list[str]] = defaultdict(list)
        for annotation in content["annotations"]:
            # An id may be a number here and a text there.
            texts[str(annotation["image_id"])] += captions_of(annotation["caption"])
        listed = [
            (one["id"], one["file_name"], texts.get(str(one["id"]), []))
            for one in content["images"]
        ]
    except FileNotFoundError:
        raise ValueError(f"captions {captions}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"captions {captions}: not COCO's captions JSON ({type(error).__name__}: {error})"
        ) from None
    if report is not None:
        for image in sorted(set(texts) - {str(given) for given, _, _ in listed}):
            report.read += 1
            report.leave_out(
                f"{captions}, image {image}", "captions of an image that is not listed"
            )
    return listed


def coco_samples(
    captions: Path, images: Path, *, report: Report, allow_outside: bool = False
) -> Iterator[Sample]:
    """One sample per image: txt is its first caption, json has all under "captions".

    Images that are missing or have no caption are counted in the report.
    """
    entries = coco_entries(captions, report=report)
    ids = [given for given, _, _ in entries]
    # A key is the id, as file names of COCO have it, where that is a number; else the place.
    if not all(isinstance(given, int) for given in ids) or len(set(ids)) < len(ids):
        ids = list(range(len(ids)))
    for key, (given, name, texts) in zip(ids, entries, strict=True):
        report.read += 1
        where = f"{captions}, image {given}"
        if not texts:
            report.leave_out(where, "no caption")
            continue
        try:
            path = file_inside(images, name, allow_outside=allow_outside)
            sample = {"__key__": f"{key:012d}", image_field(path): path.read_bytes()}
        except BROKEN_CONTENT as error:
            report.add_broken(where, one_line(error))
            continue
        notes = {"id": given, "file_name": name, "captions": texts}
        yield {**sample, "txt": texts[0].encode(), "json": json_bytes(notes)}
