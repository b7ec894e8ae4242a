"""A page that shows a model at work: it draws, describes, mends pictures and completes texts.

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
from PIL import Image
from tqdm import tqdm

from data_pipelines import command_line
from data_pipelines.emoji import Emoji, draw_emoji, find_font, fully_qualified, is_held_out
from data_pipelines.shards import write_file
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
from mmdlm.generate import Model
from mmdlm.loading import load

PAGE = "index.html"
PICTURES = "pictures"  # folder beside the page
ANIMATED = 12  # of the drawings
COLUMNS = 6  # of the animation and of the sheet
FRAME_MS, LAST_FRAME_MS = 160, 3000

PROMPTS = (
    "red heart",
    "woman firefighter dark skin tone",
    "rocket",
    "Santa Claus dark skin tone",
    "octopus",
    "sunflower",
    "woman mage light skin tone",
    "pizza",
    "panda",
    "ninja medium-light skin tone",
    "rainbow",
    "unicorn",
    "red apple",
    "fox",
    "woman vampire dark skin tone",
    "snowman",
    "man health worker light skin tone",
    "Japan",
    "person surfing light skin tone",
    "raised hand medium-light skin tone",
    "blue apple",
    "woman firefighter light skin tone red hair",
    "baby mage dark skin tone",
    "purple star",
)
DESCRIBED = (
    "hatching chick",
    "woman technologist light skin tone",
    "locomotive",
    "woman elf medium skin tone",
    "tropical fish",
    "boy dark skin tone",
    "owl",
    "man scientist medium-dark skin tone",
    "Brazil",
    "clapping hands medium-light skin tone",
    "violin",
    "farmer medium-dark skin tone",
)


@dataclass(frozen=True)
class Hole:
    """A picture by name, a box in parts of its width and height, and what it is to become."""

    name: str
    box: tuple[float, float, float, float]
    prompt: str


HOLES = (
    Hole("grinning cat", (0.0, 0.25, 1.0, 0.625), "smiling cat with heart-eyes"),
    Hole("red apple", (0.5, 0.0, 1.0, 1.0), "green apple"),
    Hole("beaming face with smiling eyes", (0.0, 0.25, 1.0, 0.5), "smiling face with sunglasses"),
)


@dataclass(frozen=True)
class Gap:
    """A text with one hole of `tokens` tokens; `picture` names what it describes, if anything."""

    before: str
    tokens: int
    after: str
    picture: str | None = None

    @property
    def text(self) -> str:
        """What `infill` is given."""
        return f"{self.before}[MASK:{self.tokens}]{self.after}"


GAPS = (
    Gap("", 1, " heart", "blue heart"),
    Gap("", 1, " heart", "green heart"),
    Gap("woman", 1, " dark skin tone"),
    Gap("smiling face with", 1, ""),
    Gap("man", 2, " medium skin tone"),
)


def main(
    out: Path = Path("demo"), *, model: str = "emoji", seed: int = 0, font: Path | None = None
) -> None:
    """Draw, describe, mend and complete with a model, and write a page about it.

    Args:
        out: Folder for the page, index.html, and its pictures.
        model: Bundled name, or the folder of a checkpoint.
        seed: Of everything that is drawn at random.
        font: Colour emoji font, for pictures to describe; default: one of this machine.
    """
    began = time.perf_counter()
    loaded = load(model)
    steps = loaded.defaults.text_to_image.num_inference_steps
    with tqdm(desc="reading the font", total=steps + 2 + len(HOLES) + len(GAPS)) as bar:
        known, missing_font = real_pictures(font)
        bar.update()
        demo = Demo(loaded, known, seed, out, bar)
        drawings, animation = demo.draw()
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
        answers=answers,
        mendings=mendings,
        completions=completions,
        missing_font=missing_font,
    )
    write_file(out / PAGE, lambda file: file.write(page(content).encode()))
    print(out / PAGE)


def real_pictures(font: Path | None) -> tuple[dict[str, Image.Image], str | None]:
    """Name -> picture of every emoji that the page needs; or none, and the way to get a font.

    Raises ValueError for a font that was named and cannot be used.
    """
    wanted = {*PROMPTS, *DESCRIBED, *(hole.name for hole in HOLES), *(gap.picture for gap in GAPS)}
    wanted &= origins().keys()
    try:
        drawn = draw_emoji(font or find_font())
    except ValueError as error:
        if font is not None:
            raise
        return {}, str(error)
    known: dict[str, Image.Image] = {}
    for one in drawn:
        if isinstance(one, Emoji) and one.name in wanted:
            known[one.name] = one.image
            if len(known) == len(wanted):
                break
    return known, None


@cache
def origins() -> dict[str, Origin]:
    """Name -> whether a model may have seen it in training, for every emoji there is."""
    names = {c: emoji_package.EMOJI_DATA[c]["en"] for c in fully_qualified()}
    return {
        name.strip(":").replace("_", " "): Origin.HELD_OUT if is_held_out(c) else Origin.TRAINED
        for c, name in names.items()
    }


def origin_of(prompt: str) -> Origin:
    """What is no emoji's name is new to any model."""
    return origins().get(prompt, Origin.NEW)


@dataclass(frozen=True)
class Demo:
    """The parts of the page; each starts from the seed, so that none depends on the others.

    known  name -> real picture, as far as a font has it
    out    folder in which pictures are written
    """

    model: Model
    known: dict[str, Image.Image]
    seed: int
    out: Path
    bar: tqdm[NoReturn]

    def draw(self) -> tuple[list[Drawing], Animation]:
        """A picture of every prompt, and the denoising of the first ones."""
        self.bar.set_description("drawing")
        frames: list[Image.Image] = []
        pictures: list[Image.Image] = []
        for pictures in self.model.draw_trajectory(PROMPTS, generator=self._generator()):
            frames.append(sheet(pictures[:ANIMATED]))
            self.bar.update()
        drawings = [
            Drawing(
                prompt=prompt,
                origin=origin_of(prompt),
                picture=self._save(picture, f"drawing-{n:02d}"),
                real=self._save(self.known[prompt], f"real-{n:02d}")
                if prompt in self.known
                else None,
            )
            for n, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True), start=1)
        ]
        self._save(sheet(pictures), "sheet")
        animation = Animation(
            moving=self._write("denoising.gif", partial(write_animation, frames)),
            still=self._save(frames[-1], "denoising"),
            prompts=PROMPTS[:ANIMATED],
            width=frames[-1].width,
            height=frames[-1].height,
        )
        return drawings, animation

    def describe(self) -> list[Answer]:
        """Captions of real pictures; without any, of pictures drawn for it."""
        self.bar.set_description("describing")
        names = [name for name in DESCRIBED if name in self.known] or list(DESCRIBED)
        pictures = self._pictures(names)
        captions = self.model.caption(pictures, generator=self._generator())
        self.bar.update()
        return [
            Answer(
                name=name,
                origin=origin_of(name),
                caption=caption,
                picture=self._save(picture, f"described-{n:02d}"),
                real=name in self.known,
            )
            for n, (name, picture, caption) in enumerate(
                zip(names, pictures, captions, strict=True), start=1
            )
        ]

    def mend(self) -> list[Mending]:
        """Each hole before, open and filled."""
        self.bar.set_description("mending")
        mendings = []
        pictures = self._pictures([hole.name for hole in HOLES])
        for n, (hole, picture) in enumerate(zip(HOLES, pictures, strict=True), start=1):
            mask = box_mask(hole.box, picture.size)
            after = self.model.inpaint(picture, mask, hole.prompt, generator=self._generator())
            mendings.append(
                Mending(
                    name=hole.name,
                    prompt=hole.prompt,
                    before=self._save(picture, f"mending-{n}-before"),
                    hole=self._save(with_hole(picture, mask), f"mending-{n}-hole"),
                    after=self._save(after, f"mending-{n}-after"),
                )
            )
            self.bar.update()
        return mendings

    def complete(self) -> list[Completion]:
        """Each gap filled, with its picture where it has one."""
        self.bar.set_description("completing")
        completions = []
        for n, gap in enumerate(GAPS, start=1):
            picture = None if gap.picture is None else self._pictures([gap.picture])[0]
            text = self.model.infill(gap.text, image=picture, generator=self._generator())
            completions.append(
                Completion(
                    before=gap.before,
                    filled=text.removeprefix(gap.before).removesuffix(gap.after),
                    after=gap.after,
                    holes=gap.tokens,
                    picture=None if picture is None else self._save(picture, f"completed-{n}"),
                    picture_name=gap.picture,
                )
            )
            self.bar.update()
        return completions

    def _pictures(self, names: Sequence[str]) -> list[Image.Image]:
        """Real pictures of the names, drawn ones in place of those that no font has."""
        absent = [name for name in names if name not in self.known]
        made = self.model.text_to_image(absent, generator=self._generator()) if absent else []
        drawn = dict(zip(absent, made, strict=True))
        return [self.known[name] if name in self.known else drawn[name] for name in names]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _save(self, picture: Image.Image, name: str) -> str:
        """Write a PNG and return its address in the page."""
        return self._write(f"{name}.png", partial(picture.save, format="PNG", optimize=True))

    def _write(self, name: str, write: Callable[[BinaryIO], object]) -> str:
        write_file(self.out / PICTURES / name, write)
        return f"{PICTURES}/{name}"


def sheet(pictures: Sequence[Image.Image], *, scale: int = 2, gap: int = 8) -> Image.Image:
    """Pictures of one size in rows, on white."""
    width, height = (side * scale for side in pictures[0].size)
    columns, rows = min(COLUMNS, len(pictures)), math.ceil(len(pictures) / COLUMNS)
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for n, picture in enumerate(pictures):
        row, column = divmod(n, columns)
        large = picture.resize((width, height), Image.Resampling.LANCZOS)
        canvas.paste(large, (gap + column * (width + gap), gap + row * (height + gap)))
    return canvas


def write_animation(frames: Sequence[Image.Image], file: BinaryIO) -> None:
    """Frames -> an endless GIF whose last frame stays longer."""
    # One palette, that of the first and the last frame, so that no colour flickers between frames.
    both = Image.new("RGB", (frames[0].width, 2 * frames[0].height))
    both.paste(frames[0], (0, 0))
    both.paste(frames[-1], (0, frames[0].height))
    palette = both.quantize(256, dither=Image.Dither.NONE)
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [FRAME_MS] * len(rest) + [LAST_FRAME_MS]
    first.save(file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def box_mask(box: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    """White inside a box that is given in parts of the width and the height."""
    mask = Image.new("L", size, 0)
    left, top, right, bottom = box
    width, height = size
    mask.paste(
        255,
        (round(left * width), round(top * height), round(right * width), round(bottom * height)),
    )
    return mask


def with_hole(picture: Image.Image, mask: Image.Image, *, square: int = 4) -> Image.Image:
    """The picture with a chequered pattern where the mask is white."""
    pattern = Image.new("RGB", picture.size, (236, 234, 230))
    for y in range(0, picture.height, square):
        for x in range(y // square % 2 * square, picture.width, 2 * square):
            pattern.paste((206, 203, 197), (x, y, x + square, y + square))
    return Image.composite(pattern, picture.convert("RGB"), mask)


if __name__ == "__main__":
    command_line.run(main)
