"""Job: any source of pictures and texts -> webdataset shards.

python -m data_pipelines.write_shards emoji --out data/emoji
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data_pipelines import command_line
from data_pipelines import emoji as emoji_source
from data_pipelines.shards import Sample, write_json, write_shards

INDEX = "index.json"  # written last: where it is, the shards are whole


def emoji(
    out: Path, *, font: Path | None = None, size: int = 64, samples_per_shard: int = 500
) -> None:
    """Draw every emoji of a colour font, with its names in all languages.

    Writes out/train and out/held_out: png, txt (the English name) and json (all names).

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
    if _is_done(out, settings):
        return
    pictures, left_out = emoji_source.report(emoji_source.draw_emoji(font, size=size))

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
                        }
                    ),
                }

    _write(
        {"train": lambda: samples(False), "held_out": lambda: samples(True)},
        out,
        settings,
        samples_per_shard=samples_per_shard,
        notes={"left_out": {one.name: one.reason for one in left_out}},
    )


def png_bytes(image: Image.Image) -> bytes:
    """A picture as PNG, without loss."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _json_bytes(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _is_done(out: Path, settings: dict[str, Any]) -> bool:
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
    splits: dict[str, Callable[[], Iterator[Sample]]],
    out: Path,
    settings: dict[str, Any],
    *,
    samples_per_shard: int,
    bytes_per_shard: int = 1 << 30,
    notes: dict[str, Any] | None = None,
) -> None:
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be 1 or more")
    shards = {}
    for split, samples in splits.items():
        counts = write_shards(
            tqdm(samples(), desc=f"writing {split}", unit=" samples"),
            out / split,
            samples_per_shard=samples_per_shard,
            bytes_per_shard=bytes_per_shard,
        )
        if counts:
            shards[split] = counts
            print(f"{out / split}: {sum(counts.values())} samples in {len(counts)} shards")
    if not shards:
        raise ValueError(f"{settings['source']}: no samples found, so {out} stays empty")
    write_json(out / INDEX, {"settings": settings, "shards": shards, **(notes or {})})


if __name__ == "__main__":
    command_line.run({"emoji": emoji})
