"""Train a model of your own images: `python -m train.own_images --images photos --out runs/mine`.

Start the same command again after a stop or a kill, and it continues.
"""

from __future__ import annotations

import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from data_pipelines import write_shards
from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.shards.shards import INDEX, expand_urls
from data_pipelines.sources.image_set import HELD_OUT, TRAIN, part_captions, split, spread
from mmdlm import load
from mmdlm.atomic_files import atomic_write
from mmdlm.cli.recipe import run
from train.image_folder.plan import MODEL_SHARE, Grid, Start
from train.image_folder.run_page import NEAREST, model_card, psnr, share_near
from train.image_folder.stages import OwnRun
from train.rollouts.gallery import Shown as Gallery
from train.stopping import SIGNALS, Stopped

CARD = "README.md"  # of the final model, written last
ASKED = 200  # captions of each part that are drawn for the figures at the end, at most
COMPARED = {TRAIN: 10, HELD_OUT: 2}  # shards of images that a drawn one is compared with, at most
COMPARED_SIZE = 64  # pixels, at most
MAX_BROKEN = 0.5  # share of the images


@sole_writer
def main(
    images: Path,
    out: Path,
    *,
    size: int = 64,
    hours: float = 2.0,
    start: Start = "auto",
    text: str | None = None,
    prompts: list[str] | None = None,
    held_out: float = 0.05,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Train a model that draws your images from captions, and captions them.

    Reads the images, trains an image tokenizer and the model for as long as you say, and shows in
    OUT/index.html what they have learned so far. The result is OUT/model/final: `python -m
    mmdlm.cli.main draw "a caption" --model OUT/model/final`. After a stop or a kill the same
    command
    continues.

    Args:
        images: Folder of png, jpg and webp images, at any depth. Captions are in metadata.jsonl or
            metadata.csv, beside each image (name.txt, name.json), or else the names of the folders
            or files.
        out: Folder for all that is made, one for each run.
        size: Height and width in pixels of the images that the model will draw.
        hours: How long all of it may take on this machine; sizes and steps follow from it.
        start: Start from the bundled model (emoji), from nothing, or (auto) from the bundled model
            where the size, the captions and the time suit it.
        text: Column of the metadata with the captions; default: text, caption, captions, prompt or
            label.
        prompts: What else to draw on the page.
        held_out: Share of the images that is kept from training, to see what is new to the model.
        seed: Of all that is random.
        threads: CPU threads; all by default.
    """
    _check(images, out, hours, held_out)
    made = OwnRun(
        out,
        Grid(size),
        f"A model of {images.resolve().name}",
        hours,
        start,
        tuple(prompts or ()),
        seed,
    )
    options = {
        "images": str(images),
        "size": size,
        "hours": hours,
        "start": start,
        "text": text,
        "held_out": held_out,
        "seed": seed,
    }
    if threads:
        torch.set_num_threads(threads)
    with _going_on():
        _begin(made, options)
        if (made.final / CARD).is_file():
            print(f"{out} is finished; draw with\n{made.usage}")
            return
        print(f"1 of 5: read the images in {images}")
        _read(made, options)
        print(f"2 of 5: the words of the captions\n{made.choice.why}")
        made.learn_words()
        made.page.write()
        print(f"3 of 5: the image tokenizer; {made.page.path} shows how it goes")
        made.train_tokenizer()
        print("4 of 5: the images as codes")
        made.encode()
        print("5 of 5: the model")
        made.train_model()
        _finish(made)


def _check(images: Path, out: Path, hours: float, held_out: float) -> None:
    if not 0 < hours < math.inf:
        raise ValueError(f"hours is {hours}; give a time above 0, such as 2 or 0.5")
    if not 0 < held_out <= 0.5:
        raise ValueError(f"held_out is {held_out}; it is a share of the images, up to 0.5")
    one, other = out.resolve(), images.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"out {out} and images {images} lie in each other; name another --out")


@contextmanager
def _going_on() -> Iterator[None]:
    """Say of every stop that the same command continues; between trainings, stop at once."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    heard = [one for one in SIGNALS if one != signal.SIGINT]
    previous = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    except Stopped:  # it has said so
        raise
    except (SystemExit, KeyboardInterrupt):
        print("stopped; the same command continues from here", file=sys.stderr)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _begin(made: OwnRun, options: dict[str, Any]) -> None:
    """Refuse the folder of something else, or of a run with other options (ValueError)."""
    there = [path for path in made.out.iterdir() if not path.name.startswith(".")]
    if there and not made.plan.decided:
        raise ValueError(
            f"out {made.out} holds {there[0].name}, which is of no run; name a folder of its own"
        )
    made.plan.once("command", lambda: "train.own_images")
    before = made.plan.decided.get("options", options)
    for name, value in options.items():
        if before[name] != value:
            raise ValueError(
                f"{made.out} was begun with {name} {before[name]}, not {value}; give the same, or "
                "name another --out"
            )
    for trial in made.out.glob(".trial_*"):  # of a run that was killed
        shutil.rmtree(trial)


def _read(made: OwnRun, options: dict[str, Any]) -> None:
    """Scale and split the images, and print what they are."""
    began, scaled = time.monotonic(), made.data / "scaled"
    write_shards.folder(
        Path(options["images"]),
        scaled,
        text=options["text"],
        size=options["size"],
        max_broken=MAX_BROKEN,
    )
    try:
        print(split(scaled, made.data, share=options["held_out"]))
    except ValueError:
        if not (made.data / INDEX).is_file():  # it was no set: the next command reads another
            shutil.rmtree(made.data)
        raise
    made.plan.once("options", lambda: options)
    made.plan.once("seconds_of_reading", lambda: time.monotonic() - began)


# ---- what it can do ------------------------------------------------------------------------------


def _finish(made: OwnRun) -> None:
    """Measure the model, and write its figures to the page and to its card."""
    print("what the model can do")
    results = _results(made)
    made.page.write(results, usage=made.usage)
    card = model_card(made.title, made.page.facts, results, usage=made.usage)
    atomic_write(made.final / CARD, lambda file: file.write(card.encode()))
    for name, value in results.items():
        print(f"{name}: {value}")
    print(f"{made.page.path} shows how it went; draw with\n{made.usage}")


def _results(made: OwnRun) -> dict[str, str]:
    """Return the figures of the trained model: name -> value."""
    model = load(made.final)
    compared = {part: expand_urls(made.data / part)[:most] for part, most in COMPARED.items()}
    size = min(COMPARED_SIZE, made.grid.size)
    gallery = Gallery([*compared[TRAIN], *compared[HELD_OUT]], size=size).read()
    each = made.plan.decided["model_pace"]["look"] / len(made.shown)  # seconds of an image
    asked = min(ASKED, max(16, int((1 - MODEL_SHARE) / 2 * 3600 * made.hours / each)))
    chance = min(1.0, NEAREST / len(gallery.names))
    results = {}
    for part, words in ((TRAIN, "captions trained on"), (HELD_OUT, "captions held out")):
        captions = spread(sorted(set(part_captions(compared[part]))), asked)
        prompts = dict(zip(captions, made.fitting(captions), strict=True))
        share, error = share_near(model, gallery, prompts, seed=made.seed)
        results[f"{words}: an image of it is among the {NEAREST} nearest to the drawn one"] = (
            f"{share:.1%} ± {error:.1%} of {len(captions)} ({chance:.1%} by chance)"
        )
    assert model.image_tokenizer is not None
    quality = psnr(model.image_tokenizer, [pair.image for pair in made.pairs[HELD_OUT]])
    results["images held out: reconstruction by the image tokenizer"] = f"{quality:.1f} dB PSNR"
    for name, value in made.held_out_losses(model).items():
        results[f"{name} held out: loss"] = f"{value:.3f} nats a token"
    return results


if __name__ == "__main__":
    run(main)
