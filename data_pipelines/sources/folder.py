"""A folder of images, with their texts in metadata.jsonl, beside them, or in their names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from data_pipelines.jobs.report import Report
from data_pipelines.shards.sample_stats import one_line
from data_pipelines.shards.shards import Sample
from data_pipelines.sources.local_files import file_inside, files_below, image_field
from data_pipelines.sources.row_files import BrokenRow, Row
from data_pipelines.sources.rows import SPLITS, rows_of_file
from data_pipelines.sources.source import BROKEN_CONTENT, IMAGES
from data_pipelines.sources.text_files import json_bytes, parsed, read_text

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
NOTES = (".md", ".txt", ".py")  # of a data set, beside the folders of its splits
OTHER_IMAGES = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jfif", ".jxl")
FILE_NAME = "file_name"  # its column that names the image, from the folder of the metadata on
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "label")  # the first that is there


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, in order; ValueError where there is none."""
    found = files_below(folder, [f".{extension}" for extension in IMAGES])
    if not found:
        raise ValueError(f"folder {folder}: no images in it ({', '.join(IMAGES)})")
    return found


def split_folder(folder: Path, split: str | None) -> Path:
    """Return the folder of one split, where a folder holds nothing but folders of splits.

    Args:
        folder: Of images.
        split: Name of a split; "all": read them all; None: there is only one.

    Returns:
        The folder itself, or that of the split in it.

    Raises:
        ValueError: There are several and none is named, or there is none of this name.
    """
    if not folder.is_dir():
        raise ValueError(f"folder {folder}: no such folder")
    known = {word for words in SPLITS.values() for word in words}
    inside = [one for one in folder.iterdir() if not one.name.startswith(".")]
    parts = {one.name: one for one in inside if one.is_dir() and one.name.lower() in known}
    others = [one for one in inside if one.name not in parts and one.suffix.lower() not in NOTES]
    if len(parts) < 2 or others:
        parts = {}
    if split == "all" or (split is None and not parts):
        return folder
    if split not in parts:
        named = ", ".join(sorted(parts)) if parts else "no splits"
        found = f"but not {split!r}" if split else "and none is named"
        raise ValueError(
            f"{folder} has {named}, {found}; name one of its splits with --split, or all of them "
            "with --split all"
        )
    return parts[split]


# ---- samples -------------------------------------------------------------------------------------


def folder_samples(
    folder: Path, *, report: Report, text: str | None = None, allow_outside: bool = False
) -> Iterator[Sample]:
    """Every image below a folder as a sample, in the order of their paths; `__file__` names it.

    Where there is a metadata.jsonl or metadata.csv, its rows are the samples: all their columns
    become json, and `text` (else the first of `TEXT_COLUMNS`) becomes txt. Otherwise the text of an
    image stands beside it (name.txt, name.json). Where no image has one, and all lie equally deep
    in several folders, the name of its folder is the text; else its file name.
    """
    images = image_files(folder)
    if described := _metadata_of(folder):
        yield from _described(images, described, report, text=text, allow_outside=allow_outside)
        return
    if text is not None:
        raise ValueError(f"text {text!r}: {folder} has no {' or '.join(METADATA)} with columns")
    _leave_out_others(folder, images, report)
    by_class = _is_by_class(folder, images)
    for number, path in enumerate(images):
        report.read += 1
        try:
            yield _sample(path, f"{number:09d}", report, by_class=by_class)
        except BROKEN_CONTENT as error:
            report.add_broken(str(path), one_line(error))


def _leave_out_others(folder: Path, images: list[Path], report: Report) -> None:
    """Count what seems to be meant: other images, texts of no image, links to nothing."""
    known = {path.with_suffix("") for path in images}
    for path in sorted({*files_below(folder, [""])} - {*images}):
        ending = path.suffix.lower()
        if not path.exists():
            reason = "a link to what is not there"
        elif ending in OTHER_IMAGES:
            reason = f"its format is none of {', '.join(IMAGES)}"
        elif ending == ".txt" and path.with_suffix("") not in known:
            reason = "a text without its image"
        else:
            continue
        report.read += 1
        report.leave_out(str(path), reason)


def source_files(folder: Path) -> list[Path]:
    """All files that `folder_samples` may read."""
    return files_below(folder, (*(f".{one}" for one in IMAGES), ".txt", ".json", *METADATA))


# ---- texts beside, or in names -------------------------------------------------------------------


def _sample(path: Path, key: str, report: Report, *, by_class: bool) -> Sample:
    """Return an image and its text, from name.txt and name.json beside it, else from a name."""
    sample: Sample = {"__key__": key, "__file__": str(path), image_field(path): path.read_bytes()}
    text, notes = path.with_suffix(".txt"), path.with_suffix(".json")
    if text.is_file():
        sample["txt"] = _text_of(text).strip().encode()
    if notes.is_file():
        sample["json"] = _text_of(notes, parsed).encode()
    if "txt" not in sample and "json" not in sample:
        label = path.parent.name if by_class else path.stem
        sample["txt"] = label.replace("_", " ").encode()
        if by_class:
            sample["json"] = json_bytes({"label": label, FILE_NAME: path.name})
        kind = "folder" if by_class else "file"
        report.change(str(path), f"no text of its own; the name of its {kind} is taken")
    return sample


def _text_of(path: Path, check: Callable[[str], object] = len) -> str:
    """Read a text file; ValueError that names it where it is no text, or `check` raises it."""
    try:
        text = read_text(path)
        check(text)
    except ValueError as error:
        raise ValueError(f"{path.name!r}: {error}") from None
    return text


def _is_by_class(folder: Path, images: list[Path]) -> bool:
    """No image has a text, and all lie equally deep in folders of several names."""
    depths = {len(path.relative_to(folder).parts) for path in images}
    labels = {path.parent.name for path in images}
    if len(depths) > 1 or depths == {1} or len(labels) < 2:
        return False
    return not any(path.with_suffix(end).is_file() for path in images for end in (".txt", ".json"))


# ---- texts in metadata ---------------------------------------------------------------------------


def _metadata_of(folder: Path) -> list[Path]:
    """Return the files with metadata; ValueError for two in one folder, or another format."""
    found = [path for path in files_below(folder, METADATA) if path.name in METADATA]
    for one, other in pairwise(found):
        if one.parent == other.parent:
            raise ValueError(f"{one.parent} has both {one.name} and {other.name}; remove one")
    return found


def _described(
    images: list[Path],
    described: list[Path],
    report: Report,
    *,
    text: str | None,
    allow_outside: bool,
) -> Iterator[Sample]:
    """Yield the rows of metadata as samples; images that no row names are left out."""
    named = set()
    rows = chain.from_iterable(
        ((metadata.parent, row) for row in rows_of_file(metadata)) for metadata in described
    )
    for number, (place, row) in enumerate(rows):
        report.read += 1
        if isinstance(row, BrokenRow):
            report.add_broken(row.where, row.reason)
            continue
        column = text or _text_column(row)
        try:
            path = file_inside(place, row[FILE_NAME], allow_outside=allow_outside)
            named.add(os.path.realpath(path))
            captions = captions_of(row[column])
            if not captions:
                report.leave_out(row.where, f"no caption: its {column!r} is empty")
                continue
            content = {image_field(path): path.read_bytes()}
            sample = {"__key__": f"{number:09d}", "__file__": str(path), **content}
        except BROKEN_CONTENT as error:
            report.add_broken(row.where, one_line(error))
            continue
        values = dict(row.values)
        yield {**sample, "txt": captions[0].encode(), "json": json_bytes(values)}
    for path in images:
        if os.path.realpath(path) not in named:
            report.read += 1
            report.leave_out(str(path), "no row of the metadata names it")


def captions_of(value: Any) -> list[str]:
    """Return the captions that are not empty, of one or a list; ValueError for anything else."""
    given = value if isinstance(value, list) else [value]
    if wrong := [one for one in given if one is not None and not isinstance(one, str)]:
        raise ValueError(f"its caption is no text but {type(wrong[0]).__name__}")
    return [one.strip() for one in given if one and one.strip()]


def _text_column(row: Row) -> str:
    column = next((name for name in TEXT_COLUMNS if name in row.values), None)
    if column is None:
        raise ValueError(
            f"{row.where} has the columns {', '.join(row.values)}: none of "
            f"{', '.join(TEXT_COLUMNS)}; name the one with the captions with --text"
        )
    return column
