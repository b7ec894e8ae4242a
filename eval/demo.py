"""A page that shows a model at work: it draws, describes, mends images and completes texts.

python -m eval.demo --out demo
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO, NoReturn

import emoji as emoji_package
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from data_pipelines.sources.emoji import fully_qualified, is_held_out
from eval.demo_page import (
    Animation,
    Answer,
    Completion,
    Content,
    Drawing,
    Mending,
    Origin,
    page,
)
from mmdlm import load
from mmdlm.atomic_files import atomic_write
from mmdlm.cli import recipe as command_line
from mmdlm.pipeline.model import Model
from mmdlm.vision.image_files import open_image

PAGE = "index.html"
IMAGES = "images"  # folder beside the page
DESCRIBED_IMAGES = Path(__file__).with_name("demo_images")  # real emoji: those of DESCRIBED
ANIMATED = 12  # of the drawings
COLUMNS = 6  # of the animation and of the sheet
FRAME_MS, LAST_FRAME_MS = 160, 3000

PROMPTS = (  # fixed before the bundled model was trained: 12 things, 9 names kept away, 3 others
    "rocket",
    "woman firefighter dark skin tone",
    "octopus",
    "Santa Claus dark skin tone",
    "sunflower",
    "woman mage light skin tone",
    "pizza",
    "ninja medium-light skin tone",
    "panda",
    "woman vampire dark skin tone",
    "house",
    "smiling face with sunglasses",
    "banana",
    "man health worker light skin tone",
    "guitar",
    "person surfing light skin tone",
    "hamburger",
    "unicorn",
    "fire engine",
    "woman elf medium skin tone",
    "snowman",
    "raised hand medium-light skin tone",
    "red apple",
    "Japan",
)
INVENTED = (
    "blue apple",
    "woman firefighter light skin tone red hair",
    "purple star",
    "green cat face",
)
DESCRIBED = (
    "rocket",
    "woman technologist light skin tone",
    "octopus",
    "man scientist medium-dark skin tone",
    "sunflower",
    "woman elf medium skin tone",
    "locomotive",
    "boy dark skin tone",
    "red apple",
    "grinning cat",
    "beaming face with smiling eyes",
    "blue heart",
)


@dataclass(frozen=True)
class Hole:
    """An image by name, the outline of a hole in it, and what it is to become.

    Attributes:
        outline: Corners (x, y) in parts of the width and the height.
    """

    name: str
    outline: tuple[tuple[float, float], ...]
    prompt: str


HOLES = (
    Hole(
        "grinning cat",
        ((0.0, 0.35), (0.25, 0.26), (0.75, 0.26), (1.0, 0.35), (0.9, 0.6), (0.5, 0.55), (0.1, 0.6)),
        "smiling cat with heart-eyes",
    ),
    Hole(
        "red apple",
        ((0.45, 0.0), (0.6, 0.0), (1.0, 0.2), (1.0, 1.0), (0.55, 1.0), (0.4, 0.7), (0.6, 0.4)),
        "green apple",
    ),
    Hole(
        "beaming face with smiling eyes",
        ((0.05, 0.3), (0.95, 0.3), (1.0, 0.5), (0.8, 0.6), (0.5, 0.5), (0.2, 0.6), (0.0, 0.5)),
        "smiling face with sunglasses",
    ),
)


@dataclass(frozen=True)
class Gap:
    """A text with one hole of `tokens` tokens; `image` names what it describes, if anything."""

    before: str
    tokens: int
    after: str
    image: str | None = None

    @property
    def text(self) -> str:
        """What `infill` is given."""
        return f"{self.before}[MASK:{self.tokens}]{self.after}"


GAPS = (
    Gap("", 1, " heart", "blue heart"),
    Gap("woman", 1, " dark skin tone"),
    Gap("smiling face with", 1, ""),
    Gap("man", 2, " medium skin tone"),
)


def main(out: Path = Path("demo"), *, model: str = "emoji", seed: int = 0) -> None:
    """Draw, describe, mend and complete with a model, and write a page about it.

    Args:
        out: Folder for the page, index.html, and its images.
        model: Bundled name, or the folder of a checkpoint or a run.
        seed: Of everything that is drawn at random.
    """
    began = time.perf_counter()
    loaded = load(model)
    steps = loaded.defaults.text_to_image.num_inference_steps
    with tqdm(desc="reading images", total=steps + 3 + len(HOLES) + len(GAPS)) as bar:
        known = real_images()
        bar.update()
        demo = Demo(loaded, known, seed, out, bar)
        drawings, animation = demo.draw()
        invented = demo.invent()
        answers = demo.describe()
        mendings = demo.mend()
        completions = demo.complete()
    content = Content(
        model=model,
        seed=seed,
        seconds=time.perf_counter() - began,
        steps=steps,
        animation=animation,
        drawings=drawings,
        invented=invented,
        answers=answers,
        mendings=mendings,
        completions=completions,
    )
    atomic_write(out / PAGE, lambda file: file.write(page(content).encode()))
    print(out / PAGE)


def real_images() -> dict[str, Image.Image]:
    """Return the real emoji that lie beside this file, by name: no font is needed."""
    return {name: open_image(DESCRIBED_IMAGES / f"{file_name(name)}.png") for name in DESCRIBED}


def file_name(name: str) -> str:
    """Return the name of an emoji as that of a file."""
    return name.replace(" ", "-")


@cache
def origins() -> dict[str, Origin]:
    """Name -> whether a model may have seen it in training, for every emoji there is."""
    names = {c: emoji_package.EMOJI_DATA[c]["en"] for c in fully_qualified()}
    return {
        name.strip(":").replace("_", " "): Origin.HELD_OUT if is_held_out(c) else Origin.TRAINED
        for c, name in names.items()
    }


def origin_of(prompt: str) -> Origin:
    """Return where a prompt comes from; what is no emoji's name is new to any model."""
    return origins().get(prompt, Origin.NEW)


@dataclass(frozen=True)
class Demo:
    """The parts of the page; each starts from the seed, so that none depends on the others.

    Attributes:
        known: name -> real image.
        out: Folder in which images are written.
    """

    model: Model
    known: dict[str, Image.Image]
    seed: int
    out: Path
    bar: tqdm[NoReturn]

    def draw(self) -> tuple[list[Drawing], Animation]:
        """Draw an image of every prompt, and the denoising of the first ones."""
        self.bar.set_description("drawing")
        frames: list[Image.Image] = []
        images: list[Image.Image] = []
        for images in self.model.draw_trajectory(PROMPTS, generator=self._generator()):
            frames.append(sheet(images[:ANIMATED]))
            self.bar.update()
        drawings = self._drawings(PROMPTS, images, "drawing")
        self._save(sheet(images), "sheet")
        animation = Animation(
            moving=self._write("denoising.gif", partial(write_animation, frames)),
            still=self._save(frames[-1], "denoising"),
            prompts=PROMPTS[:ANIMATED],
            width=frames[-1].width,
            height=frames[-1].height,
        )
        return drawings, animation

    def invent(self) -> list[Drawing]:
        """Draw an image of each prompt that is no emoji's name."""
        self.bar.set_description("inventing")
        images = self.model.text_to_image(INVENTED, generator=self._generator())
        self.bar.update()
        return self._drawings(INVENTED, images, "invented")

    def _drawings(
        self, prompts: Sequence[str], images: Sequence[Image.Image], kind: str
    ) -> list[Drawing]:
        return [
            Drawing(
                prompt=prompt,
                origin=origin_of(prompt),
                image=self._save(image, f"{kind}-{n:02d}"),
                real=self._save(self.known[prompt], f"{kind}-{n:02d}-real")
                if prompt in self.known
                else None,
            )
            for n, (prompt, image) in enumerate(zip(prompts, images, strict=True), start=1)
        ]

    def describe(self) -> list[Answer]:
        """Captions of the real images."""
        self.bar.set_description("describing")
        images = [self.known[name] for name in DESCRIBED]
        captions = self.model.caption(images, generator=self._generator())
        self.bar.update()
        return [
            Answer(
                name=name,
                origin=origin_of(name),
                caption=caption,
                image=self._save(image, f"described-{n:02d}"),
            )
            for n, (name, image, caption) in enumerate(
                zip(DESCRIBED, images, captions, strict=True), start=1
            )
        ]

    def mend(self) -> list[Mending]:
        """Each hole before, open and filled."""
        self.bar.set_description("mending")
        mendings = []
        for n, hole in enumerate(HOLES, start=1):
            image = self.known[hole.name]
            mask = outline_mask(hole.outline, image.size)
            after = self.model.inpaint(image, mask, hole.prompt, generator=self._generator())
            mendings.append(
                Mending(
                    name=hole.name,
                    prompt=hole.prompt,
                    before=self._save(image, f"mending-{n}-before"),
                    hole=self._save(with_hole(image, mask), f"mending-{n}-hole"),
                    after=self._save(after, f"mending-{n}-after"),
                )
            )
            self.bar.update()
        return mendings

    def complete(self) -> list[Completion]:
        """Each gap filled, with its image where it has one."""
        self.bar.set_description("completing")
        completions = []
        for n, gap in enumerate(GAPS, start=1):
            image = None if gap.image is None else self.known[gap.image]
            text = self.model.infill(gap.text, image=image, generator=self._generator())
            completions.append(
                Completion(
                    before=gap.before,
                    filled=text.removeprefix(gap.before).removesuffix(gap.after),
                    after=gap.after,
                    holes=gap.tokens,
                    image=None if image is None else self._save(image, f"completed-{n}"),
                    image_name=gap.image,
                )
            )
            self.bar.update()
        return completions

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _save(self, image: Image.Image, name: str) -> str:
        """Write a PNG and return its address in the page."""
        return self._write(f"{name}.png", partial(image.save, format="PNG", optimize=True))

    def _write(self, name: str, write: Callable[[BinaryIO], object]) -> str:
        atomic_write(self.out / IMAGES / name, write)
        return f"{IMAGES}/{name}"


def sheet(images: Sequence[Image.Image], *, scale: int = 2, gap: int = 8) -> Image.Image:
    """Images of one size in rows, on white."""
    width, height = (side * scale for side in images[0].size)
    columns, rows = min(COLUMNS, len(images)), math.ceil(len(images) / COLUMNS)
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for n, image in enumerate(images):
        row, column = divmod(n, columns)
        large = image.resize((width, height), Image.Resampling.LANCZOS)
        canvas.paste(large, (gap + column * (width + gap), gap + row * (height + gap)))
    return canvas


def write_animation(frames: Sequence[Image.Image], file: BinaryIO) -> None:
    """Frames -> an endless GIF whose last frame stays longer."""
    # One palette, that of the first and the last frame, so that no color flickers between frames.
    both = Image.new("RGB", (frames[0].width, 2 * frames[0].height))
    both.paste(frames[0], (0, 0))
    both.paste(frames[-1], (0, frames[0].height))
    palette = both.quantize(256, dither=Image.Dither.NONE)
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [FRAME_MS] * len(rest) + [LAST_FRAME_MS]
    first.save(file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def outline_mask(outline: Sequence[tuple[float, float]], size: tuple[int, int]) -> Image.Image:
    """Return a mask of a size, white inside the outline; see `Hole`."""
    mask = Image.new("L", size, 0)
    corners = [(x * (size[0] - 1), y * (size[1] - 1)) for x, y in outline]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    return mask


def with_hole(image: Image.Image, mask: Image.Image, *, square: int = 4) -> Image.Image:
    """Return the image with a checkered pattern where the mask is white."""
    pattern = Image.new("RGB", image.size, (236, 234, 230))
    for y in range(0, image.height, square):
        for x in range(y // square % 2 * square, image.width, 2 * square):
            pattern.paste((206, 203, 197), (x, y, x + square, y + square))
    return Image.composite(pattern, image, mask)


if __name__ == "__main__":
    command_line.run(main)
