"""Benchmark: how well an image tokenizer gives images back, in dB of PSNR.

python -m eval.reconstruction --tokenizer TOKENIZER --shards SHARDS --by json.style
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data_pipelines.jobs.shard_job import own_device
from data_pipelines.shards.sample_stats import BrokenSample, SampleStats, one_line
from data_pipelines.shards.shards import expand_urls, read_shard
from data_pipelines.sources.source import BROKEN_CONTENT, field_image, field_value
from eval.emoji.contact_sheet import FAINT, Card, sheet_of
from eval.metrics import estimate, psnr
from eval.provenance import describe_hardware
from mmdlm.atomic_files import atomic_write
from mmdlm.cli import recipe as command_line
from mmdlm.vision.image_files import MAX_PIXELS
from mmdlm.vision.pixels import Fit, to_image, to_pixels
from mmdlm.vision.tokenizers.auto import load_image_tokenizer

ALL = "all"
KEPT = 1024  # images, the first ones, of which the sheet shows some


def main(
    tokenizer: Path,
    shards: str | list[str],
    *,
    out: Path = Path("runs/eval/reconstruction.json"),
    by: str | None = None,
    limit: int | None = None,
    fit: Fit = "crop",
    batch_size: int = 64,
    sheet_images: int = 24,
    max_broken: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    allow_pipe: bool = False,
    device: str | None = None,
) -> None:
    """Encode and decode the images of shards; print the PSNR of each group with its standard error.

    Writes --out, and beside it (.png) a sheet of some of the images, from the worst to the best.

    Args:
        tokenizer: Folder of the image tokenizer (config.json, model.safetensors).
        shards: Folder, path, glob, brace range or URL of image shards, or several of them.
        out: JSON file for the result.
        by: Field that names the group of an image, such as json.style; default: one group.
        limit: Images, the first of the shards; default: all.
        fit: How an image that is not square becomes so: crop, pad with white, or stretch.
        batch_size: Images that are encoded at once.
        sheet_images: Images on the sheet.
        max_broken: Share of broken samples that are left out and listed; more stop the benchmark.
        max_pixels: Images of more pixels are not decoded, and count as broken.
        allow_pipe: Run the commands of shards that are given as pipe:COMMAND.
        device: "cpu", "cuda" and so on; default: a GPU where there is one, else the CPU.
    """
    for name, value in (("batch_size", batch_size), ("sheet_images", sheet_images)):
        if value < 1:
            raise ValueError(f"--{name} {value} is too small; give 1 or more")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} is too small; give 1 or more")
    urls = expand_urls(shards, allow_pipe=allow_pipe)
    place = torch.device(device or own_device())
    model = load_image_tokenizer(tokenizer).to(place)
    stats = SampleStats(max_broken)

    def images() -> Iterator[tuple[str, str, Tensor]]:
        for url in urls:
            for sample in read_shard(url):
                try:
                    image = field_image(sample, max_pixels=max_pixels)
                    group = ALL if by is None else str(field_value(sample, by))
                    pixels = to_pixels(image, model.image_size, fit=fit)
                except BROKEN_CONTENT as error:
                    stats.add_broken(BrokenSample(url, sample["__key__"], one_line(error)))
                    continue
                stats.good += 1
                yield sample["__key__"], group, pixels

    values: dict[str, list[float]] = defaultdict(list)
    cards: list[tuple[float, Card]] = []
    bar = tqdm(islice(images(), limit), desc="reconstructing", unit=" images")
    while some := list(islice(bar, batch_size)):
        real = torch.stack([pixels for *_, pixels in some])
        with torch.inference_mode():
            again = model.reconstruct(real.to(place))[0].clamp(-1, 1).cpu()
        for n, quality in enumerate(psnr(again, real).tolist()):
            name, group, _ = some[n]
            for key in {group, ALL}:
                values[key].append(quality)
            if len(cards) < KEPT:
                note = (f"{quality:.1f} dB, {group}", FAINT)
                card = Card(to_image(real[n]), to_image(again[n]), name, (note,))
                cards.append((quality, card))
    if not cards:
        raise ValueError(f"shards {shards}: no image could be read")

    results = {key: estimate(torch.tensor(found)) for key, found in sorted(values.items())}
    for key, one in results.items():
        print(f"{key:<32}{one.value:>7.2f} ± {one.standard_error:.2f} dB of {one.count}")
    report = {
        "results": {key: asdict(one) for key, one in results.items()},
        "left_out": stats.broken,
        "settings": {"tokenizer": str(tokenizer), "shards": urls, "by": by, "fit": fit},
        "hardware": describe_hardware(place),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    atomic_write(out, lambda file: file.write(text.encode()))
    sheet, page = out.with_suffix(".png"), _sheet(cards, sheet_images)
    atomic_write(sheet, lambda file: page.save(file, "PNG"))
    print(out, sheet, sep="\n")


def _sheet(cards: list[tuple[float, Card]], count: int) -> Image.Image:
    """Draw images beside their reconstructions, evenly spaced in the order of quality."""
    ordered = sorted(cards, key=lambda one: one[0])
    places = torch.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().int().tolist()
    shown = [ordered[place][1] for place in places]
    lines = [f"{len(shown)} of the first {len(cards)} images, from the worst to the best."]
    return sheet_of(shown, "Through the image tokenizer and back", lines, heads=("image", "again"))


if __name__ == "__main__":
    command_line.run(main)
