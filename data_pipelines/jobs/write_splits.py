"""The last step of jobs that write shards: samples of each split, and the index of them all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.jobs.origin import Given
from data_pipelines.jobs.report import Report
from data_pipelines.shards.shards import INDEX, Sample, write_json, write_shards
from mmdlm.vision.pixels import MAX_EDGE

SHARD_BYTES = 1 << 30


def check_edge(size: int) -> None:
    """Raise ValueError for images of no size, and for those that no memory holds."""
    if not 1 <= size <= MAX_EDGE:
        raise ValueError(f"size is {size}; give 1 to {MAX_EDGE} pixels")


def write_splits(
    splits: Mapping[str, Iterable[Sample]],
    out: Path,
    settings: dict[str, Any],
    given: Given,
    report: Report,
    *,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write the samples of each split to out/split, and an index that says of what they are made.

    Args:
        splits: Samples of each split, by its name.
        out: Folder for the splits and their index.
        settings: Of the job, recorded in the index.
        given: Files that the samples are made of.
        report: What was left out; it is filled while samples are read.
        notes: More to record in the index.
    """
    if settings["samples_per_shard"] < 1:
        raise ValueError(f"samples_per_shard is {settings['samples_per_shard']}; 1 is the least")
    states = given.states()  # before they are read: what changes meanwhile is noticed next time
    shards = {}
    for split, samples in splits.items():
        counts = write_shards(
            samples,
            out / split,
            samples_per_shard=settings["samples_per_shard"],
            bytes_per_shard=SHARD_BYTES,
        )
        shards[split] = counts
        report.written += sum(counts.values())
        print(f"{out / split}: {sum(counts.values())} samples in {len(counts)} shards")
    print(report)
    if not report.written:
        raise ValueError(f"{settings['source']}: no samples found, so {out} stays empty")
    record = {"settings": settings, "given": states, "shards": shards, "report": report.to_dict()}
    write_json(out / INDEX, {**record, **(notes or {})})
