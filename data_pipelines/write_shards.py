"""Job: any source of images and texts -> webdataset shards.

python -m data_pipelines.write_shards emoji --out data/emoji
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from data_pipelines.jobs.origin import Given, is_done
from data_pipelines.jobs.report import Report
from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.jobs.write_rows import (
    conversations,
    dataset,
    interleaved,
    preferences,
    text,
)
from data_pipelines.jobs.write_splits import check_edge, write_splits
from data_pipelines.shards.shards import INDEX, Sample
from data_pipelines.sources import emoji as emoji_source
from data_pipelines.sources.coco import coco_entries, coco_samples
from data_pipelines.sources.folder import (
    folder_samples,
    image_files,
    source_files,
    split_folder,
)
from data_pipelines.sources.image_set import scaled_samples
from data_pipelines.sources.source import png_bytes
from data_pipelines.sources.text_files import json_bytes
from mmdlm.cli import recipe as command_line


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
    check_edge(size)
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
    split: str | None = None,
    allow_outside: bool = False,
    max_broken: float = 0.01,
    samples_per_shard: int = 1000,
) -> None:
    """Pack a folder of images, with the texts beside them (name.txt, name.json) or their names.

    A metadata.jsonl, .csv or .parquet with a file_name in each row takes the place of such texts.
    Images without any text that lie in several folders have the names of their folders. Hidden
    files are left out, and links to folders followed.

    Args:
        images: Folder with png, jpg or webp images, at any depth.
        out: Folder for the shards.
        text: Column of the metadata with the texts; default: text, caption, captions, prompt or
            label.
        size: Scale each image to a square of so many pixels, padded with white; default: pack the
            files as they are.
        split: Folder of one split, where the folder holds train, test or validation; "all" of them.
        allow_outside: Read images whose path in the metadata leads out of its folder.
        max_broken: Share of images that may be left out as broken; more stop the job.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    settings = {
        "source": "folder",
        "images": str(images),
        "text": text,
        "split": split,
        "size": size,
        "samples_per_shard": samples_per_shard,
    }
    if size is not None:
        check_edge(size)
    images = split_folder(images, split)
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
    given = Given({str(captions): str(captions)}, {str(images): image_files(images)})
    if not is_done(out / INDEX, settings, given):
        report = Report(max_broken)
        samples = coco_samples(captions, images, report=report, allow_outside=allow_outside)
        bar = tqdm(samples, total=total, desc="packing", unit=" images")
        write_splits({"": bar}, out, settings, given, report)


if __name__ == "__main__":
    command_line.run(
        {
            "emoji": emoji,
            "folder": folder,
            "coco": coco,
            "dataset": dataset,
            "text": text,
            "conversations": conversations,
            "preferences": preferences,
            "interleaved": interleaved,
        }
    )
