"""Run the commands of `mmdlm`; torch and Pillow are imported only where they are used."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mmdlm
from mmdlm.cli.image_files import (
    ANIMATED_FORMATS,
    animation,
    check_place,
    encode,
    sentence,
    write,
)
from mmdlm.cli.names import ORDERS, SCHEDULES
from mmdlm.cli.option_types import MOST_SEEDS
from mmdlm.cli.results import places_of, progress, stem_of, tell, tell_files
from mmdlm.cli.sources import images_of, texts_of

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from mmdlm.core.sampling.generators import Generators
    from mmdlm.pipeline.model import Model
    from mmdlm.pipeline.options import ImageOptions, TextOptions

# Per forward pass, which bounds memory however many there are.
CAPTIONS_AT_ONCE = IMAGES_AT_ONCE = ANSWERS_AT_ONCE = 16


def draw(options: argparse.Namespace) -> None:
    """Draw one or more images of each prompt, and optionally the denoising as an animation."""
    prompts, each = texts_of(options.prompts), options.num_images
    if options.seed + each > MOST_SEEDS:
        raise ValueError(
            f"--seed {options.seed} is too large for {each} images with a seed each; "
            f"take one up to {MOST_SEEDS - each}"
        )
    outputs = places_of(options.output, [stem_of(prompt) for prompt in prompts], each=each)
    if options.animate is not None:
        check_place(options.animate, "--animate", ANIMATED_FORMATS)
        if options.animate.resolve() in [path.resolve() for path in outputs]:
            raise ValueError(
                f"--animate and --output both name {str(options.animate)!r}; "
                "give two different files"
            )
        if len(prompts) > 1:
            raise ValueError(
                f"--animate shows the images of one prompt, but there are {len(prompts)}; leave it "
                "out, or give one prompt"
            )

    model = load_model(options, "text_to_image")
    # Each image is what a command of its own would draw, whatever is drawn beside it.
    jobs = [
        (path, prompt, options.seed + number)
        for (prompt, number), path in zip(
            ((prompt, number) for prompt in prompts for number in range(each)), outputs, strict=True
        )
    ]
    at_once = len(jobs) if options.animate is not None else IMAGES_AT_ONCE
    for start in range(0, len(jobs), at_once):
        _draw_some(model, options, jobs[start : start + at_once])


def _draw_some(
    model: Model, options: argparse.Namespace, jobs: list[tuple[Path, str, int]]
) -> None:
    """Draw the images of some (path, prompt, seed) in one pass, and write them."""
    drawing: ImageOptions = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "negative_prompt": options.negative_prompt,
        "height": options.height,
        "width": options.width,
        "think": options.think,
        "generator": [_generator(seed) for _, _, seed in jobs],
    }
    prompts = [prompt for _, prompt, _ in jobs]
    if options.animate is None:
        hidden = options.quiet or not sys.stderr.isatty()
        model.set_progress_bar_config(desc="drawing", leave=False, disable=hidden)
        frames = [cast("list[Image.Image]", model(prompts, **drawing).images)]
    else:  # the same images, step by step
        total = options.steps or model.defaults.text_to_image.num_inference_steps
        steps = model.draw_trajectory(prompts, **drawing)
        frames = list(progress(options, steps, "drawing", total=total))
    files = [(path, encode(one, path)) for (path, *_), one in zip(jobs, frames[-1], strict=True)]
    records: list[dict[str, object]] = [
        {"prompt": prompt, "seed": seed, "file": str(path)} for path, prompt, seed in jobs
    ]
    if options.animate is not None:
        files.append((options.animate, animation(frames, options.animate)))
        records.append({"prompt": prompts[0], "file": str(options.animate)})
    write(files)
    tell_files(options, records)


def caption(options: argparse.Namespace) -> None:
    """Describe images in one line each, which begins with the image's path if there are several."""
    sources = images_of(options.images)
    for source in sources:  # a bad image is found before the model is loaded
        if source.is_named and not source.is_url:
            source.open(options.max_pixels)

    model = load_model(options, "caption")
    starts: Iterable[int] = range(0, len(sources), CAPTIONS_AT_ONCE)
    if not sys.stdout.isatty():  # on a terminal the captions themselves show how far it is
        total = math.ceil(len(sources) / CAPTIONS_AT_ONCE)
        starts = progress(options, starts, "captioning", total=total)
    broken = 0
    for start in starts:
        opened: list[tuple[str, Image.Image]] = []
        for source in sources[start : start + CAPTIONS_AT_ONCE]:
            try:
                opened.append((source.name, source.open(options.max_pixels)))
            except ValueError as error:
                if source.is_named:
                    raise
                broken += 1
                print(f"mmdlm: skipped {sentence(error)}", file=sys.stderr)
        if not opened:
            continue
        texts = model.caption(
            [image for _, image in opened],
            num_inference_steps=options.steps,
            generator=[_generator(options.seed) for _ in opened],  # each as in a call of its own
        )
        for (name, _), text in zip(opened, texts, strict=True):
            shown = text if len(sources) == 1 else f"{name}\t{text}"
            tell(options, shown, image=name, caption=text)
    if broken:
        raise ValueError(f"{broken} of {len(sources)} images could not be read; see above")


def inpaint(options: argparse.Namespace) -> None:
    """Fill a hole of an image as words say."""
    from mmdlm.vision.image_files import open_mask

    (output,) = places_of(options.output, [f"{options.image.stem}-inpainted"])
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

    model = load_model(options, "inpaint")
    result = model.inpaint(
        image,
        mask,
        options.prompt or "",
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        generator=_generator(options.seed),
        strength=options.strength,
    )
    write([(output, encode(result, output))])
    record: dict[str, object] = {"image": str(options.image), "prompt": options.prompt or ""}
    tell_files(options, [{**record, "seed": options.seed, "file": str(output)}])


def infill(options: argparse.Namespace) -> None:
    """Print texts with words in place of their holes."""
    texts = texts_of(options.texts, by_line=False)
    image = None if options.image is None else _image(options.image, options)
    model = load_model(options, "infill")
    found = model.infill(
        texts,
        image=image,
        num_inference_steps=options.steps,
        generator=[_generator(options.seed) for _ in texts],
    )
    for text, filled in zip(texts, found, strict=True):
        tell(options, filled, text=text, infilled=filled)


def edit(options: argparse.Namespace) -> None:
    """Draw another image from images and an instruction."""
    (output,) = places_of(options.output, [f"{options.images[-1].stem}-edited"])
    images = [_seen(path, options) for path in options.images]
    model = load_model(options, "edit")
    result = model.edit(
        images,
        options.prompt,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        image_guidance_scale=options.image_guidance_scale,
        generator=_generator(options.seed),
    )
    write([(output, encode(result, output))])
    record: dict[str, object] = {"images": [*map(str, options.images)], "prompt": options.prompt}
    tell_files(options, [{**record, "seed": options.seed, "file": str(output)}])


def answer(options: argparse.Namespace) -> None:
    """Print the answers to questions, optionally about images."""
    from mmdlm.pipeline.inputs import with_places
    from mmdlm.templates.conversation import check_messages

    questions = texts_of(options.questions)
    images = [_seen(path, options) for path in options.image]
    for question in questions:
        said = with_places(question, len(images))
        check_messages([{"role": "user", "content": said}], len(images))
    model = load_model(options, "answer")
    for start in range(0, len(questions), ANSWERS_AT_ONCE):
        some = questions[start : start + ANSWERS_AT_ONCE]
        found = model.answer(
            some,
            [images] * len(some) if images else None,
            **_writing(options, [_generator(options.seed) for _ in some]),
            think=options.think,
        )
        for question, text in zip(some, found, strict=True):
            shown = text if len(questions) == 1 else f"{question}\t{text}"
            tell(options, shown, question=question, answer=text)


def chat(options: argparse.Namespace) -> None:
    """Talk: each line of stdin is a message, each answer a line or more of stdout."""
    from mmdlm.cli.chat_session import COMMANDS, Conversation

    model = load_model(options, "chat")
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

    def say(line: str) -> None:
        if (text := conversation.say(line)) is not None:
            tell(options, text, message=line, answer=text)

    if not sys.stdin.isatty():
        for line in map(str.strip, sys.stdin):
            if line == "/quit":
                return
            if line:
                say(line)
        return
    if not options.quiet:
        print(f"Say something; {COMMANDS} are commands.", file=sys.stderr)
    while (typed := _typed("> ")) is not None and typed != "/quit":
        try:
            if typed:
                say(typed)
        except ValueError as error:  # said in one sentence, and the conversation goes on
            print(f"mmdlm: {sentence(error)}", file=sys.stderr)


def complete(options: argparse.Namespace) -> None:
    """Print texts whose beginnings are given."""
    texts = texts_of(options.texts, by_line=False)
    model = load_model(options, "complete")
    found = model.complete(texts, **_writing(options, [_generator(options.seed) for _ in texts]))
    for text, rest in zip(texts, found, strict=True):
        tell(options, text + rest, text=text, completion=rest)


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
            block_length=options.block_length,
        )
    else:
        given = {
            "--mask-token": options.mask_token is not None,
            "--no-shift": options.no_shift,
            "--block-length": options.block_length is not None,
            "--image-codes": options.image_codes > 0,
        }
        if strays := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"{strays[0]} goes only with --from; leave it out")
        shards = formats.convert(options.folders[0], out, to=options.to or formats.OURS)
    _follow(options, shards, "converting")
    tell_files(options, [{"file": str(out)}])


# --- what commands share ---


def load_model(options: argparse.Namespace, task: str | None) -> Model:
    """Load the model as the options say; it is refused early if it lacks the task that is named."""
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
    told = io.StringIO() if options.quiet else sys.stderr  # which step of a run answers
    with contextlib.redirect_stderr(told):
        model = mmdlm.load(
            options.model,
            device=options.device,
            revision=options.revision,
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


def _writing(options: argparse.Namespace, generator: Generators) -> TextOptions:
    """Collect the options of a command that writes a text."""
    return {
        "num_inference_steps": options.steps,
        "max_new_tokens": options.max_new_tokens,
        "stop": options.stop,
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


def _follow(options: argparse.Namespace, parts: Iterable[tuple[int, int]], what: str) -> None:
    """Show a bar for work that says (done, total) after each part."""
    from tqdm import tqdm

    hidden = options.quiet or not sys.stderr.isatty()
    with tqdm(desc=what, leave=False, disable=hidden) as bar:
        for done, total in parts:
            bar.total = total
            bar.update(done - bar.n)
