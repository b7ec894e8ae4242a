"""Run the commands of `mmdlm`; torch and Pillow are imported only where they are used."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mmdlm
from mmdlm.cli.image_files import (
    ANIMATED_FORMATS,
    IMAGE_FORMATS,
    animation,
    check_place,
    encode,
    numbered,
    sentence,
    write,
)
from mmdlm.cli.names import ORDERS, SCHEDULES
from mmdlm.cli.option_types import MOST_SEEDS

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from mmdlm.pipeline.model import Model
    from mmdlm.pipeline.options import ImageOptions, TextOptions

Item = TypeVar("Item")

CAPTIONS_AT_ONCE = 16  # images per forward pass: bounds memory when a folder is captioned


def draw(options: argparse.Namespace) -> None:
    """Draw one or more images from words, and optionally the denoising as an animation."""
    outputs = numbered(options.output, options.num_images)
    if options.seed + options.num_images > MOST_SEEDS:
        raise ValueError(
            f"--seed {options.seed} is too large for {options.num_images} images with a seed each; "
            f"take one up to {MOST_SEEDS - options.num_images}"
        )
    for path in outputs:
        check_place(path, "--output", IMAGE_FORMATS)
    if options.animate is not None:
        check_place(options.animate, "--animate", ANIMATED_FORMATS)
        if options.animate.resolve() in [path.resolve() for path in outputs]:
            raise ValueError(
                f"--animate and --output both name {str(options.animate)!r}; "
                "give two different files"
            )

    model = _load(options, "text_to_image")
    drawing: ImageOptions = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "negative_prompt": options.negative_prompt,
        "num_images_per_prompt": options.num_images,
        "height": options.height,
        "width": options.width,
        "think": options.think,
        "generator": _generators(options.seed, options.num_images),
    }
    if options.animate is None and not sys.stderr.isatty():
        frames = [model.text_to_image(options.prompt, **drawing)]
    else:  # the same images, step by step: to be kept, or to be waited for with a bar
        steps = model.draw_trajectory(options.prompt, **drawing)
        total = options.steps or model.defaults.text_to_image.num_inference_steps
        frames = list(_progress(steps, "drawing", total=total))
    files = [(path, encode(one, path)) for path, one in zip(outputs, frames[-1], strict=True)]
    if options.animate is not None:
        files.append((options.animate, animation(frames, options.animate)))
    write(files)


def caption(options: argparse.Namespace) -> None:
    """Describe images in one line each, which begins with the image's path if there are several."""
    for path in options.images:  # a bad image is found before the model is loaded
        _seen(path, options)

    model = _load(options, "caption")
    starts: Iterable[int] = range(0, len(options.images), CAPTIONS_AT_ONCE)
    if not sys.stdout.isatty():  # on a terminal the captions themselves show how far it is
        starts = _progress(
            starts, "captioning", total=math.ceil(len(options.images) / CAPTIONS_AT_ONCE)
        )
    for start in starts:
        paths = options.images[start : start + CAPTIONS_AT_ONCE]
        images = [_image(path, options) for path in paths]
        texts = model.caption(
            images,
            num_inference_steps=options.steps,
            generator=[_generator(options.seed) for _ in images],  # each as in a call of its own
        )
        for path, text in zip(paths, texts, strict=True):
            print(text if len(options.images) == 1 else f"{path}\t{text}", flush=True)


def inpaint(options: argparse.Namespace) -> None:
    """Fill a hole of an image as words say."""
    from mmdlm.vision.image_files import open_mask

    check_place(options.output, "--output", IMAGE_FORMATS)
    image = _image(options.image, options, whole=True)
    if options.box is None:
        mask = open_mask(options.mask, max_pixels=options.max_pixels)
    else:
        mask = _box_mask(options.box, image.size)
    if mask.size != image.size:
        raise ValueError(
            f"mask {str(options.mask)!r} is {_size(mask.size)} but the image is "
            f"{_size(image.size)}; give a mask of the image's size"
        )
    if mask.getbbox() is None:
        raise ValueError(
            f"mask {str(options.mask)!r} has no hole: all of it is black; make white what is "
            "to be drawn again"
        )

    model = _load(options, "inpaint")
    result = model.inpaint(
        image,
        mask,
        options.prompt or "",
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        generator=_generator(options.seed),
    )
    write([(options.output, encode(result, options.output))])


def infill(options: argparse.Namespace) -> None:
    """Print a text with words in place of its holes."""
    image = None if options.image is None else _image(options.image, options)
    model = _load(options, "infill")
    text = model.infill(
        options.text,
        image=image,
        num_inference_steps=options.steps,
        generator=_generator(options.seed),
    )
    print(text)


def edit(options: argparse.Namespace) -> None:
    """Draw another image from images and an instruction."""
    check_place(options.output, "--output", IMAGE_FORMATS)
    images = [_seen(path, options) for path in options.images]
    model = _load(options, "edit")
    result = model.edit(
        images,
        options.prompt,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        image_guidance_scale=options.image_guidance_scale,
        generator=_generator(options.seed),
    )
    write([(options.output, encode(result, options.output))])


def answer(options: argparse.Namespace) -> None:
    """Print the answer to a question, optionally about images."""
    from mmdlm.pipeline.inputs import with_places
    from mmdlm.templates.conversation import check_messages

    images = [_seen(path, options) for path in options.image]
    said = with_places(options.question, len(images))
    check_messages([{"role": "user", "content": said}], len(images))
    model = _load(options, "answer")
    text = model.answer(
        options.question,
        images or None,
        **_writing(options, _generator(options.seed)),
        think=options.think,
    )
    print(text)


def chat(options: argparse.Namespace) -> None:
    """Talk: each line of stdin is a message, each answer a line or more of stdout."""
    from mmdlm.cli.chat_session import COMMANDS, Conversation

    model = _load(options, "chat")
    generator = _generator(options.seed)

    def speak(messages: list[dict[str, str]], images: list[Image.Image]) -> str:
        text: str = model.chat(
            messages,
            images,
            **_writing(options, generator),
            think=options.think,
        )
        return text

    conversation = Conversation(speak, options.system, options.max_pixels)
    if not sys.stdin.isatty():
        for text in conversation.run(sys.stdin):
            if text is not None:
                print(text, flush=True)
        return
    print(f"Say something; {COMMANDS} are commands.", file=sys.stderr)
    while (line := _typed("> ")) is not None and line != "/quit":
        try:
            text = conversation.say(line) if line else None
        except ValueError as error:  # said in one sentence, and the conversation goes on
            print(f"mmdlm: {sentence(error)}", file=sys.stderr)
            continue
        if text is not None:
            print(text, flush=True)


def complete(options: argparse.Namespace) -> None:
    """Print a text whose beginning is given."""
    model = _load(options, "complete")
    text = model.complete(
        options.text,
        **_writing(options, _generator(options.seed)),
    )
    print(options.text + text)


def convert(options: argparse.Namespace) -> None:
    """Write a checkpoint in another format, and print its folder."""
    start = options.start
    if len(options.folders) != (1 if start else 2):
        wanted = "only OUT beside --from" if start else "two folders, IN and OUT"
        raise ValueError(f"convert takes {wanted}, but got {' '.join(map(str, options.folders))}")
    out = Path(options.folders[-1])
    if out.exists():
        raise ValueError(f"{out} exists already; name a folder that does not, or remove it")

    from mmdlm.models.checkpoints.grown_vocabulary import MASK_TOKEN
    from mmdlm.models.checkpoints.to_diffusion import convert_to_diffusion
    from mmdlm.pipeline import convert as formats
    from mmdlm.pipeline.hub import find_checkpoint

    if start:
        if options.to is not None:
            raise ValueError(f"--to {options.to} does not go with --from, which writes our format")
        shards = convert_to_diffusion(
            find_checkpoint(start),
            out,
            mask_token=options.mask_token or MASK_TOKEN,
            shift=not options.no_shift,
            image_codes=options.image_codes,
        )
    else:
        given = {
            "--mask-token": options.mask_token is not None,
            "--no-shift": options.no_shift,
            "--image-codes": options.image_codes > 0,
        }
        if strays := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"{strays[0]} goes only with --from; leave it out")
        shards = formats.convert(options.folders[0], out, to=options.to or formats.OURS)
    _follow(shards, "converting")
    print(out)


# --- what commands share ---


def _load(options: argparse.Namespace, task: str) -> Model:
    """Load the model as the options say; it is refused early if it lacks the task."""
    import torch

    from mmdlm.core.sampling.order import Order
    from mmdlm.core.sampling.unmasking import UnmaskingRule
    from mmdlm.pipeline.inputs import part_of

    chosen: dict[str, Any] = {
        name: part_of(given, kind, names=names)
        for name, given, kind, names in (
            ("order", options.order, Order, ORDERS),
            ("schedule", options.schedule, UnmaskingRule, SCHEDULES),
        )
        if given is not None
    }
    model = mmdlm.load(
        options.model,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        quantization=options.quantization,
        adapter=options.adapter,
        image_tokenizer=options.image_tokenizer,
        task=task,
    )
    return model.with_generation(
        cache=options.cache,
        cache_refresh=options.cache_refresh,
        threshold=options.threshold,
        distinct=options.distinct or None,
        reproduce=options.reproduce,
        published_defects=options.published_defects or None,
        **chosen,
    )


def _image(path: Path, options: argparse.Namespace, *, whole: bool = False) -> Image.Image:
    from mmdlm.vision.image_files import open_image

    return open_image(path, max_pixels=options.max_pixels, whole=whole)


def _seen(path: Path, options: argparse.Namespace) -> Image.Image:
    """Open an image file that is neither too small nor too narrow to be seen."""
    from mmdlm.vision.pixels import check_visible

    image = _image(path, options)
    try:
        check_visible(*image.size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return image


def _generator(seed: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(seed)


def _generators(seed: int, count: int) -> torch.Generator | list[torch.Generator]:
    """Return a generator for each of several outputs, of this seed and those after it."""
    if count == 1:
        return _generator(seed)
    return [_generator(seed + number) for number in range(count)]


def _writing(options: argparse.Namespace, generator: torch.Generator) -> TextOptions:
    """Collect the options of a command that writes a text."""
    return {
        "num_inference_steps": options.steps,
        "max_new_tokens": options.max_new_tokens,
        "block_length": options.block_length,
        "temperature": options.temperature,
        "guidance_scale": options.guidance_scale,
        "generator": generator,
    }


def _box_mask(box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """Make a mask of size (width, height): white inside the box, black elsewhere."""
    from PIL import Image

    if box[2] > size[0] or box[3] > size[1]:
        raise ValueError(
            f"--box {','.join(map(str, box))} leaves the image, which is {_size(size)} pixels"
        )
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _typed(prompt: str) -> str | None:
    """Read a line from the terminal; None at its end."""
    try:
        return input(prompt).strip()
    except EOFError:
        print(file=sys.stderr)
        return None


def _progress(items: Iterable[Item], what: str, *, total: int) -> Iterable[Item]:
    """Show a bar with rate and time left on stderr, if that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=what, total=total, leave=False, disable=not sys.stderr.isatty())


def _follow(parts: Iterable[tuple[int, int]], what: str) -> None:
    """Show a bar for work that says (done, total) after each part."""
    from tqdm import tqdm

    with tqdm(desc=what, leave=False, disable=not sys.stderr.isatty()) as bar:
        for done, total in parts:
            bar.total = total
            bar.update(done - bar.n)
