"""A folder of pictures, with their texts beside them or in their names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.shards import Sample
from data_pipelines.source import PICTURES


def picture_files(folder: Path) -> list[Path]:
    """All pictures below a folder, in order; ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"folder {folder}: no such folder")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower().removeprefix(".") in PICTURES and path.is_file()
    )
    if not found:
        raise ValueError(f"folder {folder}: no pictures in it ({', '.join(PICTURES)})")
    return found


def picture_sample(path: Path, *, key: str) -> Sample:
    """A picture and its text: name.txt and name.json beside it, else its file name in words."""
    extension = path.suffix.lower().removeprefix(".")
    sample: Sample = {"__key__": key, extension: path.read_bytes()}
    text, notes = path.with_suffix(".txt"), path.with_suffix(".json")
    if text.is_file():
        sample["txt"] = text.read_text(encoding="utf-8").strip().encode()
    if notes.is_file():
        sample["json"] = notes.read_bytes()
        json.loads(sample["json"])
    if len(sample) == 2:
        sample["txt"] = path.stem.replace("_", " ").encode()
    return sample


def folder_samples(folder: Path) -> Iterator[Sample]:
    """Every picture below a folder as a sample, in the order of their paths."""
    for number, path in enumerate(picture_files(folder)):
        yield picture_sample(path, key=f"{number:09d}")
