"""Job: any source of pictures and texts -> webdataset shards.

python -m data_pipelines.write_shards emoji --out data/emoji
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data_pipelines import command_line
from data_pipelines import emoji as emoji_source
from data_pipelines.coco import coco_entries, coco_samples
from data_pipelines.conversation_files import Columns, conversation_samples, rows_of
from data_pipelines.folder import folder_samples, picture_files
from data_pipelines.preferences import PairColumns
from data_pipelines.shards import Sample, write_json, write_shards
from data_pipelines.stream import Tally
from data_pipelines.text import count_lines, jsonl_samples
from mmdlm.layouts.conversation import IMAGE

SHARD_BYTES = 1 << 30
INDEX = "index.json"  # written last: where it is, the shards are whole


def emoji(
    out: Path, *, font: Path | None = None, size: int = 64, samples_per_shard: int = 500
) -> None:
    """Draw every emoji of a colour font, with its names in all languages.

    Writes out/train and out/held_out: png, txt (the English name) and json (all names, and the
    weight of `data_pipelines.emoji.sampling_weights`).

    Args:
        out: Folder for the shards.
        font: Colour emoji font; default: one of this machine.
        size: Height and width of the pictures, in pixels.
        samples_per_shard: Samples in one shard.
    """
    font = font or emoji_source.find_font()
    settings = {
        "source": "emoji",
        "font": font.name,
        "size": size,
        "samples_per_shard": samples_per_shard,
    }
    if is_done(out, settings):
        return
    pictures, left_out = emoji_source.draw_with_report(font, size=size)
    weights = emoji_source.sampling_weights(one for one in pictures if not one.held_out)

    def samples(held_out: bool) -> Iterator[Sample]:
        for drawn in pictures:
            if drawn.held_out == held_out:
                yield {
                    "__key__": drawn.key,
                    "png": png_bytes(drawn.image),
                    "txt": drawn.name.encode(),
                    "json": _json_bytes(
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

    _write(
        {
            split: tqdm(samples(held_out), total=total, desc=f"writing {split}", unit=" samples")
            for split, held_out, total in (
                ("train", False, sum(not one.held_out for one in pictures)),
                ("held_out", True, sum(one.held_out for one in pictures)),
            )
        },
        out,
        settings,
        notes={"left_out": {one.name: one.reason for one in left_out}},
    )


def folder(images: Path, out: Path, *, samples_per_shard: int = 1000) -> None:
    """Pack a folder of pictures, with the texts beside them (name.txt, name.json) or their names.

    Args:
        images: Folder with png, jpg or webp pictures, at any depth.
        out: Folder for the shards.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    settings = {
        "source": "folder",
        "images": str(images),
        "samples_per_shard": samples_per_shard,
    }
    if not is_done(out, settings):
        total = len(picture_files(images))
        samples = tqdm(folder_samples(images), total=total, desc="packing", unit=" pictures")
        _write({"": samples}, out, settings)


def coco(captions: Path, images: Path, out: Path, *, samples_per_shard: int = 1000) -> None:
    """Pack pictures with the captions of a COCO captions JSON.

    Args:
        captions: The JSON file, such as captions_train2017.json.
        images: Folder with the pictures that it names.
        out: Folder for the shards.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    settings = {
        "source": "coco",
        "captions": str(captions),
        "images": str(images),
        "samples_per_shard": samples_per_shard,
    }
    if not is_done(out, settings):
        total = len(coco_entries(captions))
        samples = tqdm(
            coco_samples(captions, images), total=total, desc="packing", unit=" pictures"
        )
        _write({"": samples}, out, settings)


def text(file: Path, out: Path, *, field: str = "text", samples_per_shard: int = 10000) -> None:
    """Pack the texts of a file of JSON lines.

    Args:
        file: One JSON object a line.
        out: Folder for the shards.
        field: Name of the text in the object.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    settings = {
        "source": "text",
        "file": str(file),
        "field": field,
        "samples_per_shard": samples_per_shard,
    }
    if not is_done(out, settings):
        samples = tqdm(
            jsonl_samples(file, field=field),
            total=count_lines(file),
            desc="packing",
            unit=" texts",
        )
        _write({"": samples}, out, settings)


def conversations(
    source: str,
    out: Path,
    *,
    images: Path | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    system: str = "",
    picture: str = IMAGE,
    split: str = "train",
    subset: str | None = None,
    max_broken: float = 0.01,
    samples_per_shard: int = 1000,
) -> None:
    """Pack conversations, with their pictures, of files or a data set of the Hugging Face Hub.

    A row has messages (role, content), conversations (from, value) or prompt and completion, and
    may have image or images. Rows that cannot be used are counted, listed and left out.

    Args:
        source: A .json, .jsonl or .parquet file, a folder of them, or OWNER/NAME on the Hub.
        out: Folder for the shards.
        images: Folder that the paths of pictures begin in.
        prompt: Column, or template over columns such as "{question} Think.", of the question.
        completion: Column, or template over columns, of its answer.
        system: System message of rows that are made of prompt and completion.
        picture: Mark of a picture in a text.
        split: Of a data set on the Hub.
        subset: Of a data set on the Hub; default: its own.
        max_broken: Share of rows that may be left out; more stop the job.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    columns = Columns(prompt, completion, system, images, picture)
    _write_rows(
        "conversations",
        source,
        out,
        columns,
        split=split,
        subset=subset,
        max_broken=max_broken,
        samples_per_shard=samples_per_shard,
    )


def preferences(
    source: str,
    out: Path,
    *,
    images: Path | None = None,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    picture: str = IMAGE,
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
        images: Folder that the paths of pictures begin in.
        prompt: Column of the prompt.
        chosen: Column of the answer that is preferred.
        rejected: Column of the other answer.
        picture: Mark of a picture in a text.
        split: Of a data set on the Hub.
        subset: Of a data set on the Hub; default: its own.
        max_broken: Share of rows that may be left out; more stop the job.
        samples_per_shard: Samples in one shard; a shard also ends at 1 GiB.
    """
    columns = PairColumns(prompt, chosen, rejected, images, picture)
    _write_rows(
        "preferences",
        source,
        out,
        columns,
        split=split,
        subset=subset,
        max_broken=max_broken,
        samples_per_shard=samples_per_shard,
    )


def _write_rows(
    kind: str,
    source: str,
    out: Path,
    columns: Columns | PairColumns,
    *,
    split: str,
    subset: str | None,
    max_broken: float,
    samples_per_shard: int,
) -> None:
    """The rows of files or of a data set, as `columns` reads them."""
    settings = {
        "source": kind,
        "of": source,
        **{name: value and str(value) for name, value in asdict(columns).items()},
        "split": split,
        "subset": subset,
        "samples_per_shard": samples_per_shard,
    }
    if is_done(out, settings):
        return
    tally = Tally(max_broken)
    rows = rows_of(source, split=split, subset=subset)
    samples = conversation_samples(rows, columns, source=source, tally=tally)
    _write({"": tqdm(samples, desc="packing", unit=f" {kind}")}, out, settings)
    if tally.broken:
        print(f"{out}: {tally.broken} left out: {tally.summary()}")


def png_bytes(image: Image.Image) -> bytes:
    """A picture as PNG, without loss."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _json_bytes(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def is_done(out: Path, settings: dict[str, Any]) -> bool:
    """True where the same command has finished before; ValueError where another one has."""
    index = out / INDEX
    if not index.is_file():
        return False
    before = json.loads(index.read_text())["settings"]
    if before != settings:
        differing = {k: (before.get(k), v) for k, v in settings.items() if before.get(k) != v}
        said = ", ".join(f"{k} was {old}, now {new}" for k, (old, new) in differing.items())
        raise ValueError(f"{out} holds shards of other settings ({said}); name another --out")
    print(f"{out}: already written")
    return True


def _write(
    splits: dict[str, Iterable[Sample]],
    out: Path,
    settings: dict[str, Any],
    *,
    notes: dict[str, Any] | None = None,
) -> None:
    if settings["samples_per_shard"] < 1:
        raise ValueError(f"samples_per_shard is {settings['samples_per_shard']}; 1 is the least")
    shards = {}
    for split, samples in splits.items():
        counts = write_shards(
            samples,
            out / split,
            samples_per_shard=settings["samples_per_shard"],
            bytes_per_shard=SHARD_BYTES,
        )
        shards[split] = counts
        print(f"{out / split}: {sum(counts.values())} samples in {len(counts)} shards")
    if not any(shards.values()):
        raise ValueError(f"{settings['source']}: no samples found, so {out} stays empty")
    write_json(out / INDEX, {"settings": settings, "shards": shards, **(notes or {})})


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
