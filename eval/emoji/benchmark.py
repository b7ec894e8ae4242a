"""Benchmark: emoji by name. Captions, drawings, reconstructions, likelihood and speed of a model.

python -m eval.emoji --config configs/eval/emoji.yaml
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from data_pipelines.sources.emoji import (
    find_font,
)
from eval.emoji.answers import Asked
from eval.emoji.gallery import Gallery, some_of
from eval.emoji.measures import ELBO, measure, measure_speed
from eval.emoji.report import Files, drawing_sheet, table, tokenizer_sheet, write_image
from eval.provenance import describe_hardware, describe_model
from mmdlm import load
from mmdlm.cli import recipe as command_line


def main(
    model: str = "emoji",
    *,
    out: Path = Path("runs/eval/emoji.json"),
    sheet: Path | None = None,
    font: Path | None = None,
    shards: str | None = None,
    limit: int | None = None,
    steps: int | None = None,
    caption_steps: int | None = None,
    guidance_scale: float | None = None,
    drawings: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    likelihood_items: int = 128,
    speed_repeats: int = 3,
    sheet_images: int = 48,
    device: str | None = None,
) -> None:
    """Measure a model on the emoji data set: on the names it was trained on, and on held-out ones.

    Prints a table and writes the JSON of --out, with every number and setting; beside it every
    answer, one emoji a line (.jsonl), and two sheets of images.

    Args:
        model: Bundled name, or the folder of a checkpoint or a run.
        out: JSON file for the result.
        sheet: PNG file for held-out images, drawn beside real; default: --out with .png. The
            tokenizer's reconstructions go beside it, with -tokenizer added to the name.
        font: Color emoji font to draw the real images with; default: one of this machine.
        shards: Instead of a font: the shards that `data_pipelines.write_shards emoji` wrote, such
            as "data/emoji/{train,held_out}/*.tar".
        limit: Trained names to ask for, chosen at random by the seed; default: all. The held-out
            ones are all asked for, always.
        steps: Denoising steps of a drawing; default: the model's own number.
        caption_steps: Denoising steps of a caption; default: the model's own number.
        guidance_scale: Guidance of a drawing, 1 is off; default: the model's own value.
        drawings: Of each name, with the seeds from --seed on; measures are means over them, with
            standard errors over names, and sheets and answers show the first.
        seed: Of everything that is drawn at random.
        batch_size: Emoji in one call of the model; drawings depend on it, as on the seed.
        likelihood_items: Emoji of each kind whose likelihood is estimated; 0: none.
        speed_repeats: Timed calls, of which the median is the speed; 0: speed is not measured.
        sheet_images: Images on a sheet.
        device: "cpu", "cuda" and so on; default: a GPU where there is one, else the CPU.
    """
    _check_at_least(
        1, limit=limit, drawings=drawings, batch_size=batch_size, sheet_images=sheet_images
    )
    _check_at_least(0, seed=seed, likelihood_items=likelihood_items, speed_repeats=speed_repeats)
    _check_device(device)
    if font is not None and shards is not None:
        raise ValueError(f"--font {font} and --shards {shards} exclude each other; give one")
    files = Files.of(out, sheet)
    if shards is None:
        font = font or find_font()
    loaded = load(model, device=device)
    described = describe_model(model, loaded)
    own = Asked.of(loaded, steps, caption_steps, guidance_scale)
    asked = replace(own, drawings=drawings, seed=seed, batch_size=batch_size)
    began, hardware = time.perf_counter(), describe_hardware(loaded.device)

    gallery = Gallery.draw(font or find_font()) if shards is None else Gallery.read(shards)
    splits = {
        name: measure(loaded, gallery, places, asked, likelihood_items=likelihood_items, title=name)
        for name, places in gallery.split(limit, seed=seed).items()
    }
    last = list(splits)[-1]  # the held-out ones, where there are any
    speed = measure_speed(loaded, gallery, splits[last].places, asked, repeats=speed_repeats)
    report = {
        "results": {name: split.results for name, split in splits.items()},
        "speed": speed,
        "settings": {
            "limit": limit,
            **asdict(asked),
            "likelihood": {"items": likelihood_items, **asdict(ELBO)},
        },
        "data": gallery.describe(),
        "model": described,
        "hardware": hardware,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(table(report))
    files.write(report, splits, gallery)
    shown = some_of(len(splits[last].places), sheet_images, seed=seed)
    is_new = last == "held-out"
    write_image(files.sheet, drawing_sheet(splits[last], gallery, shown, is_new=is_new))
    write_image(files.tokenizer_sheet, tokenizer_sheet(splits[last], gallery, shown))
    print("", *asdict(files).values(), sep="\n")


def _check_at_least(least: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} is too small; give {least} or more")


def _check_device(device: str | None) -> None:
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:  # unknown, not there, or torch built without it
        raise ValueError(
            f"--device {device} does not work here; try cpu, or leave it out"
        ) from error


if __name__ == "__main__":
    command_line.run(main)
