"""Images with captions as a set to train on: scaled once, split in two, and summed up."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low
from typing import TypeVar

from PIL import Image

from data_pipelines.jobs.origin import Given, is_done
from data_pipelines.jobs.report import Report
from data_pipelines.jobs.shard_job import whole_samples
from data_pipelines.shards.sample_stats import one_line
from data_pipelines.shards.shards import (
    INDEX,
    Sample,
    expand_urls,
    read_json,
    write_json,
    write_shards,
)
from data_pipelines.sources.folder import TEXT_COLUMNS, captions_of
from data_pipelines.sources.source import BROKEN_CONTENT, IMAGES, field_image, png_bytes
from data_pipelines.sources.text_files import decoded, json_bytes, parsed
from mmdlm.vision.image_files import image_facts, open_image
from mmdlm.vision.pixels import Fit, check_size, check_visible, to_image, to_pixels

T = TypeVar("T")
ORIGIN = "origin.json"  # field of a scaled sample: what its image was before
SHARDS = {"samples_per_shard": 1000, "bytes_per_shard": 1 << 30}
PARTS = TRAIN, HELD_OUT = "train", "held_out"
LEAST = 8  # images of a set
EXAMPLES = 20
DETAIL = 2  # times the size that is kept: the least at which an image is decoded
BLANK = "nothing but white is left of it where what is transparent is set on white"


# ---- scaling -------------------------------------------------------------------------------------


def scaled_samples(
    samples: Iterable[Sample], *, size: int, report: Report, fit: Fit = "pad"
) -> Iterator[Sample]:
    """Scale the image of each sample to a PNG of `size` pixels square.

    Each image is decoded once, JPEG files at about the size that is needed. What the image was
    (its file, width and height, transparency, sha256) becomes the field `ORIGIN`. Broken images are
    counted in the report by their file, and so are those of which nothing can be seen. Raises
    ValueError for a size that is too small.
    """
    check_size(size, size)
    for sample in samples:
        name = sample["__file__"]
        field = next(field for field in IMAGES if field in sample)
        data = sample[field]
        try:
            width, height, transparent = image_facts(data)
            check_visible(width, height)
            image = to_image(to_pixels(open_image(data, least=DETAIL * size), size, fit=fit))
        except BROKEN_CONTENT as error:
            report.add_broken(name, one_line(error))
            continue
        if transparent and image.getextrema() == ((255, 255),) * 3:
            report.leave_out(name, BLANK)
            continue
        origin = {
            "file": name,
            "width": width,
            "height": height,
            "transparent": transparent,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        kept = {key: value for key, value in sample.items() if key != field}
        yield {**kept, "png": png_bytes(image), ORIGIN: json_bytes(origin)}


# ---- splitting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Summary of a set.

    Attributes:
        captions: Distinct ones.
        words: Distinct ones of all captions, split at spaces.
        longest: Caption, in words.
        sizes: (width, height) of the smallest, the median and the largest image, by area.
        transparent: Images with transparency, which is set on white.
        copies: Images that are the same file as another.
        skipped: Images and captions that are left out, a line for each reason.
        noted: What was read otherwise than it stands there, likewise.
        examples: File and caption.
    """

    train: int
    held_out: int
    captions: int
    words: int
    longest: int
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    transparent: int
    copies: int
    skipped: tuple[str, ...]
    noted: tuple[str, ...]
    examples: tuple[tuple[str, str], ...]

    @property
    def images(self) -> int:
        """Return the number of images of both parts."""
        return self.train + self.held_out

    @classmethod
    def read(cls, folder: Path) -> Summary:
        """Read what `split` has written to a folder."""
        found = read_json(folder / INDEX)["summary"]
        for name in ("sizes", "examples"):
            found[name] = tuple(map(tuple, found[name]))
        for name in ("skipped", "noted"):
            found[name] = tuple(found[name])
        return cls(**found)

    def __str__(self) -> str:
        (small, median, large) = (f"{width} x {height}" for width, height in self.sizes)
        lines = [
            f"{self.images} images: {self.train} to train on, {self.held_out} held out",
            f"{self.captions} distinct captions of {self.words} distinct words, the longest of "
            f"{self.longest}",
            f"sizes from {small} to {large}, half of them up to {median} pixels",
        ]
        if self.transparent:
            lines.append(f"{self.transparent} have transparency, which is set on white")
        if self.copies:
            lines.append(f"{self.copies} are copies of another image of the set")
        lines += [f"note: {line}" for line in self.noted]
        lines += [f"skipped {line}" for line in self.skipped]
        lines.append("examples:")
        lines += [f"  {file}: {caption}" for file, caption in self.examples]
        return "\n".join(lines)


@dataclass(frozen=True)
class Pair:
    """Image of a set, with its first caption."""

    caption: str
    image: Image.Image


def some_pairs(folder: Path, count: int) -> list[Pair]:
    """Return up to `count` images of a part of a set, evenly spread over it."""
    chosen = set(spread(range(len(part_captions(folder))), count))
    samples = enumerate(_samples(folder))
    return [
        Pair(decoded(sample["txt"]), field_image(sample))
        for number, sample in samples
        if number in chosen
    ]


def part_captions(shards: Path | list[str]) -> list[str]:
    """Return the first caption of each image of a part of a set, or of some of its shards."""
    return [decoded(sample["txt"]) for sample in _samples(shards)]


def spread(values: Iterable[T], count: int) -> list[T]:
    """Return up to `count` of the values, evenly spread."""
    values = list(values)
    most = min(count, len(values))
    return [values[number * len(values) // most] for number in range(most)]


def _samples(shards: Path | list[str]) -> Iterator[Sample]:
    for url in expand_urls(shards):
        yield from whole_samples(url)


@dataclass(frozen=True)
class _Entry:
    """Facts of a sample before it is written."""

    key: str
    file: str
    captions: tuple[str, ...]
    size: tuple[int, int]
    transparent: bool
    sha256: str


def split(scaled: Path, out: Path, *, share: float = 0.05) -> Summary:
    """Split shards of `scaled_samples` into out/train and out/held_out, and sum them up.

    An image is held out where its sha256 lies in the lowest `share` of all there can be, so that it
    stays on its side whatever joins the set, and a copy stays beside it; of a set in which none
    does, the lowest. A sample keeps its png; its json holds its file, all `captions`, and a
    `sampling_weight` by which captions that many images share are seen less often:
    sqrt(fewest / images of this caption).

    Args:
        scaled: Folder of the shards, as `write_shards.folder` writes it.
        out: Folder for train and held_out.
        share: Of the images that is held out.

    Returns:
        What is in both parts, as their index has it.

    Raises:
        ValueError: For too few images, and for captions that are all the same.
    """
    urls = expand_urls(scaled)
    given, settings = Given.shards(urls), {"held_out": share}
    if is_done(out / INDEX, settings, given):
        return Summary.read(out)
    states = given.states()
    report = Report.from_dict(read_json(scaled / INDEX)["report"])
    entries = {entry.key: entry for entry in _entries(urls, report)}
    _check(list(entries.values()))
    held_out = _held_out({entry.sha256 for entry in entries.values()}, share)
    counts = Counter(e.captions[0] for e in entries.values() if e.sha256 not in held_out)
    fewest = min(counts.values())

    def samples(part: str) -> Iterator[Sample]:
        for url in urls:
            for sample in whole_samples(url):
                entry = entries.get(sample["__key__"])
                if entry is None or (entry.sha256 in held_out) != (part == HELD_OUT):
                    continue
                about = {
                    "file": entry.file,
                    "captions": entry.captions,
                    "sampling_weight": math.sqrt(fewest / max(fewest, counts[entry.captions[0]])),
                }
                yield {
                    "__key__": entry.key,
                    "png": sample["png"],
                    "txt": entry.captions[0].encode(),
                    "json": json_bytes(about),
                }

    shards = {part: write_shards(samples(part), out / part, **SHARDS) for part in PARTS}
    summary = _summary(list(entries.values()), report, held_out)
    record = {"settings": settings, "given": states, "shards": shards, "summary": asdict(summary)}
    write_json(out / INDEX, record)
    return summary


def _entries(urls: list[str], report: Report) -> Iterator[_Entry]:
    for url in urls:
        for sample in whole_samples(url):
            origin = json.loads(sample[ORIGIN])
            try:
                captions = _captions(sample)
            except BROKEN_CONTENT as error:
                report.add_broken(origin["file"], one_line(error))
                continue
            if not captions:
                report.leave_out(origin["file"], "it has no caption")
                continue
            yield _Entry(
                sample["__key__"],
                origin["file"],
                captions,
                (origin["width"], origin["height"]),
                origin["transparent"],
                origin["sha256"],
            )


def _captions(sample: Sample) -> tuple[str, ...]:
    """Return all captions of a sample: a list in its json, else its txt, else its json's."""
    notes = parsed(sample["json"]) if "json" in sample else None
    listed = notes
    if isinstance(notes, dict):
        listed = next((notes[name] for name in TEXT_COLUMNS if name in notes), None)
    if isinstance(listed, list) or "txt" not in sample:
        found = captions_of(listed)
    else:
        found = [decoded(sample["txt"])]
    return tuple(" ".join(one.split()) for one in found if one.split())


def _check(entries: list[_Entry]) -> None:
    distinct = len({entry.sha256 for entry in entries})
    if distinct < LEAST:
        raise ValueError(
            f"only {distinct} images that differ, with captions, were found, and a model needs "
            f"{LEAST} at least; add some"
        )
    captions = {entry.captions for entry in entries}
    if len(captions) == 1:
        raise ValueError(
            f"all {len(entries)} images have the same caption, {entries[0].captions[0]!r}, from "
            "which nothing can be learned; give them captions that differ"
        )


def _held_out(digests: set[str], share: float) -> frozenset[str]:
    distinct = sorted(digests)
    below = [digest for digest in distinct if int(digest, 16) < share * 2**256]
    return frozenset(below[: len(distinct) // 2] or distinct[:1])


def _summary(entries: list[_Entry], report: Report, held_out: frozenset[str]) -> Summary:
    by_area = sorted((entry.size for entry in entries), key=math.prod)
    captions = {caption for entry in entries for caption in entry.captions}
    split_at_spaces = [caption.split() for caption in captions]
    held = sum(entry.sha256 in held_out for entry in entries)
    return Summary(
        train=len(entries) - held,
        held_out=held,
        captions=len(captions),
        words=len({word for words in split_at_spaces for word in words}),
        longest=max(map(len, split_at_spaces)),
        sizes=(by_area[0], median_low(by_area), by_area[-1]),
        transparent=sum(entry.transparent for entry in entries),
        copies=len(entries) - len({entry.sha256 for entry in entries}),
        skipped=tuple(map(str, report.left_out)),
        noted=tuple(map(str, report.changed)),
        examples=tuple((one.file, one.captions[0]) for one in spread(entries, EXAMPLES)),
    )
