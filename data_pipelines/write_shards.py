"""Job: any source of images and texts -> webdataset shards.

python -m data_pipelines.write_shards emoji --out data/emoji
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipelines.jobs.origin import Given, is_done
from data_pipelines.jobs.report import Report
from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.shards.shards import INDEX, Sample, write_json, write_shards
from data_pipelines.sources import emoji as emoji_source
from data_pipelines.sources.coco import coco_entries, coco_samples
from data_pipelines.sources.conversation_files import (
    Columns,
    Images,
    conversation_samples,
    local_files,
    rows_of,
)
from data_pipelines.sources.folder import files_below, folder_samples, image_files, source_files
from data_pipelines.sources.image_set import scaled_samples
from data_pipelines.sources.preferences import PairColumns
from data_pipelines.sources.source import IMAGES, png_bytes
from data_pipelines.sources.text import count_lines, jsonl_samples
from data_pipelines.sources.text_files import json_bytes
from mmdlm.cli import recipe as command_line
from mmdlm.templates.conversation import IMAGE
from mmdlm.vision.pixels import MAX_EDGE

SHARD_BYTES = 1 << 30


@sole_writer
def emoji(
    out: Path, *, font: Path | None = None, size: int = 64, samples_per_shard: int = 500
) -> None:
    """Draw every emoji of a color font, with its names in all languages.

    Writes out/train and out/held_out: png, txt (the English name) and json (all names, and the
    weight of `data_pipelines.sources.emoji.sampling_weights`).

    Args:
        out: Folder for the shards.
        font: Color emoji font; default: one of this machine.
        size: Height and width of the images, in pixels.
        samples_per_shard: Samples in one shard.
    """
    _check_edge(size)
    font = font or emoji_source.find_font()
    settings = {
        "source": "emoji",
        "font": font.name,
        "size": size,
        "samples_per_shard": samples_per_shard,
    }
    given = Given({font.name: str(font)})
    if is_done(out / INDEX, settings, given):
        return
    images, left_out = emoji_source.draw_with_report(font, size=size)
    weights = emoji_source.sampling_weights(one for one in images if not one.held_out)
    report = Report(read=len(images) + len(left_out))
    for one in left_out:
        report.leave_out(one.name, one.reason)

    def samples(held_out: bool) -> Iterator[Sample]:
        for drawn in images:
            if drawn.held_out == held_out:
                yield {
                    "__key__": drawn.key,
                    "png": png_bytes(drawn.image),
                    "txt": drawn.name.encode(),
                    "json": json_bytes(
                        {
                            "name": drawn.name,
                            "names": drawn.names,
                            "aliases": drawn.aliases,
                            "characters": drawn.characters,
                            "code_points": [f"U+{point:04X}" for point in drawn.code_points],
                            "held_out": drawn.held_out,
                            "sampling_weight": weights.get(drawn.key, 1.0),
                        }
                    ),
                }

    write_splits(
        {
            split: tqdm(samples(held_out), total=total, desc=f"writing {split}", unit=" samples")
            for split, held_out, total in (
                ("train", False, sum(not one.held_out for one in images)),
                ("held_out", True, sum(one.held_out for one in images)),
            )
        },
        out,
        settings,
        given,
        report,
    )


@sole_writer
def folder(
    images: Path,
    out: Path,
    *,
    text: str | None = None,
    size: int | None = None,
    allow_outside: bool = False,
    max_broken: float = 0.01,
    samples_per_shard: int = 1000,
) -> None:
    """Pack a folder of images, with the texts beside them (name.txt, name.json) or their names.

    A metadata.jsonl or metadata.csv with a file_name in each row takes the place of such texts.
    Images without any text that lie in several folders have the names of their folders. Hidden
    files are left out, and links to folders followed.

    Args:
        images: Folder with png, jpg or webp images, at any depth.
        out: Folder for the shards.
        text: Column of the metadata with the texts; default: text, caption, captions, prompt or
            label.
        size: Scale each image to a square of so many pixels, padded with white; default: pack the
            files as they are.
        allow_outside: Read images whose path in the metadata leads out of its folder.
        max_broken: Share of images that may be left out as broken; more stop the job.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    settings = {
        "source": "folder",
        "images": str(images),
        "text": text,
        "size": size,
        "samples_per_shard": samples_per_shard,
    }
    if size is not None:
        _check_edge(size)
    total = len(image_files(images))
    given = Given({}, {str(images): source_files(images)})
    if not is_done(out / INDEX, settings, given):
        report = Report(max_broken)
        found = folder_samples(images, report=report, text=text, allow_outside=allow_outside)
        samples: Iterable[Sample] = tqdm(found, total=total, desc="packing", unit=" images")
        if size is not None:
            samples = scaled_samples(samples, size=size, report=report)
        write_splits({"": samples}, out, settings, given, report)


@sole_writer
def coco(
    captions: Path,
    images: Path,
    out: Path,
    *,
    allow_outside: bool = False,
    max_broken: float = 0.01,
    samples_per_shard: int = 1000,
) -> None:
    """Pack images with the captions of a COCO captions JSON.

    Args:
        captions: The JSON file, such as captions_train2017.json.
        images: Folder with the images that it names.
        out: Folder for the shards.
        allow_outside: Read images whose path leads out of the folder.
        max_broken: Share of images that may be left out as broken; more stop the job.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    settings = {
        "source": "coco",
        "captions": str(captions),
        "images": str(images),
        "samples_per_shard": samples_per_shard,
    }
    total = len(coco_entries(captions))
    given = Given({str(captions): str(captions)}, _images_in(images))
    if not is_done(out / INDEX, settings, given):
        report = Report(max_broken)
        samples = coco_samples(captions, images, report=report, allow_outside=allow_outside)
        bar = tqdm(samples, total=total, desc="packing", unit=" images")
        write_splits({"": bar}, out, settings, given, report)


@sole_writer
def text(
    file: Path,
    out: Path,
    *,
    field: str = "text",
    max_broken: float = 0.01,
    samples_per_shard: int = 10000,
) -> None:
    """Pack the texts of a file of JSON lines.

    Args:
        file: One JSON object a line.
        out: Folder for the shards.
        field: Name of the text in the object.
        max_broken: Share of lines that may be left out as broken; more stop the job.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    settings = {
        "source": "text",
        "file": str(file),
        "field": field,
        "samples_per_shard": samples_per_shard,
    }
    total = count_lines(file)
    given = Given({str(file): str(file)})
    if not is_done(out / INDEX, settings, given):
        report = Report(max_broken)
        samples = jsonl_samples(file, report=report, field=field)
        bar = tqdm(samples, total=total, desc="packing", unit=" texts")
        write_splits({"": bar}, out, settings, given, report)


@sole_writer
def conversations(
    source: str,
    out: Path,
    *,
    images: Path | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    system: str = "",
    image: str = IMAGE,
    allow_outside: bool = False,
    split: str = "train",
    subset: str | None = None,
    max_broken: float = 0.01,
    samples_per_shard: int = 1000,
) -> None:
    """Pack conversations, with their images, of files or a data set of the Hugging Face Hub.

    A row has messages (role, content), conversations (from, value) or prompt and completion, and
    may have image or images. A column system (or system_prompt) is the system message, and answers
    with weight 0 are context. Rows that cannot be used are counted, listed and left out.

    Args:
        source: A .json, .jsonl or .parquet file, a folder of them, or OWNER/NAME on the Hub.
        out: Folder for the shards.
        images: Folder that the paths of images begin in; default: the one where the job runs.
        prompt: Column, or template over columns such as "{question} Think.", of the question.
        completion: Column, or template over columns, of its answer.
        system: System message of rows that have none.
        image: Mark of an image in a text.
        allow_outside: Read images whose path leads out of the folder `images`; only for data that
            you trust.
        split: Of a data set on the Hub.
        subset: Of a data set on the Hub; default: its own.
        max_broken: Share of rows that may be left out; more stop the job.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    _write_rows(
        source,
        out,
        Columns(prompt, completion, system, Images(images, image, allow_outside)),
        {
            "source": "conversations",
            "of": source,
            "prompt": prompt,
            "completion": completion,
            "system": system,
        },
        split=split,
        subset=subset,
        max_broken=max_broken,
        samples_per_shard=samples_per_shard,
    )


@sole_writer
def preferences(
    source: str,
    out: Path,
    *,
    images: Path | None = None,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    image: str = IMAGE,
    allow_outside: bool = False,
    split: str = "train",
    subset: str | None = None,
    max_broken: float = 0.01,
    samples_per_shard: int = 1000,
) -> None:
    """Pack pairs of answers, of which one is preferred, of files or a data set of the Hub.

    A row has prompt, chosen and rejected, each a text or messages (role, content), as data sets of
    TRL do; or chosen and rejected as whole conversations. Rows that cannot be used are counted,
    listed and left out.

    Args:
        source: A .json, .jsonl, .csv or .parquet file, a folder of them, or OWNER/NAME on the Hub.
        out: Folder for the shards.
        images: Folder that the paths of images begin in; default: the one where the job runs.
        prompt: Column of the prompt.
        chosen: Column of the answer that is preferred.
        rejected: Column of the other answer.
        image: Mark of an image in a text.
        allow_outside: Read images whose path leads out of the folder `images`; only for data that
            you trust.
        split: Of a data set on the Hub.
        subset: Of a data set on the Hub; default: its own.
        max_broken: Share of rows that may be left out; more stop the job.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    _write_rows(
        source,
        out,
        PairColumns(prompt, chosen, rejected, Images(images, image, allow_outside)),
        {
            "source": "preferences",
            "of": source,
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
        },
        split=split,
        subset=subset,
        max_broken=max_broken,
        samples_per_shard=samples_per_shard,
    )


def _write_rows(
    source: str,
    out: Path,
    columns: Columns | PairColumns,
    settings: dict[str, Any],
    *,
    split: str,
    subset: str | None,
    max_broken: float,
    samples_per_shard: int,
) -> None:
    """Write the rows of files or of a data set, as `columns` reads them."""
    folder, mark = columns.images.folder, columns.images.mark
    settings = {
        **settings,
        "images": folder and str(folder),
        "image": mark,
        "split": split,
        "subset": subset,
        "samples_per_shard": samples_per_shard,
    }
    files = {str(path): str(path) for path in local_files(source)}
    given = Given(files, {} if folder is None else _images_in(folder))
    if is_done(out / INDEX, settings, given):
        return
    report = Report(max_broken)
    rows = rows_of(source, split=split, subset=subset)
    samples = conversation_samples(rows, columns, source=source, report=report)
    bar = tqdm(samples, desc="packing", unit=f" {settings['source']}")
    write_splits({"": bar}, out, settings, given, report)


def _check_edge(size: int) -> None:
    """Raise ValueError for images of no size, and for those that no memory holds."""
    if not 1 <= size <= MAX_EDGE:
        raise ValueError(f"size is {size}; give 1 to {MAX_EDGE} pixels")


def _images_in(folder: Path) -> dict[str, list[Path]]:
    return {str(folder): files_below(folder, [f".{one}" for one in IMAGES])}


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


if __name__ == "__main__":
    command_line.run(
        {
            "emoji": emoji,
            "folder": folder,
            "coco": coco,
            "text": text,
            "conversations": conversations,
            "preferences": preferences,
        }
    )
