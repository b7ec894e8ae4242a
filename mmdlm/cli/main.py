"""The command line: draw, caption, inpaint, edit, infill, answer, chat, complete and convert.

    mmdlm draw "red heart" -o heart.png --animate heart.gif
    mmdlm caption heart.png
    mmdlm inpaint heart.png --box 0,0,64,32 --prompt "blue heart" -o half.png
    mmdlm infill "woman [MASK] [MASK] skin tone"
    mmdlm answer "What is on the table?" --image room.png --model GSAI-ML/LLaDA-V
    mmdlm chat --model GSAI-ML/LLaDA-8B-Instruct
    mmdlm convert GSAI-ML/LLaDA-8B-Instruct llada-here

What the user got wrong ends in one sentence on stderr and exit status 2, and it is looked for
before the slow work starts. Output files appear whole or not at all. torch and Pillow are imported
where they are used, so that `mmdlm --help` is instant.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import mmdlm
from mmdlm.cli.chat_session import forgive_encodings
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
from mmdlm.templates.infill import check_whole
from mmdlm.vision.known_names import suggestion

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from mmdlm.pipeline.model import Model

Item = TypeVar("Item")

USER_ERROR = 2
MOST_SEEDS = 2**63
INTERRUPTED = 130
DTYPES = ("float32", "bfloat16", "float16")
FAMILY_NAMES = (
    *("llada", "mmada", "lumina", "llada_v", "lavida_llada"),
    *("dream", "lavida_dream", "dimple"),
)
CACHES = ("prompt", "prefix", "dual", "delayed", "stable")
ORDERS = ("confidence", "probability", "margin", "entropy", "random", "left_to_right")
SCHEDULES = ("linear", "cosine", "maskgit", "shifted", "expected", "ancestral", "catch_up")
QUANTIZATIONS = ("4bit", "8bit", "int8", "int4", "float8")
CAPTIONS_AT_ONCE = 16  # images per forward pass: bounds memory when a folder is captioned


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for a user's error, 130 when interrupted."""
    forgive_encodings()
    try:
        parser = _parser()
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise ValueError(_unknown(unknown[0], options.command, parser))
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader left (mmdlm caption ... | head): not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"mmdlm: {sentence(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("mmdlm: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


# --- the commands ---------------------------------------------------------------------------------


def draw(options: argparse.Namespace) -> None:
    """Words -> one or more images, and on request the denoising as an animation."""
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
    if options.animate is None and not sys.stderr.isatty():
        frames = [
            model.text_to_image(
                options.prompt,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance_scale,
                negative_prompt=options.negative_prompt,
                num_images_per_prompt=options.num_images,
                height=options.height,
                width=options.width,
                think=options.think,
                generator=_generators(options.seed, options.num_images),
            )
        ]
    else:  # the same images, step by step: to be kept, or to be waited for with a bar
        steps = model.draw_trajectory(
            options.prompt,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            negative_prompt=options.negative_prompt,
            num_images_per_prompt=options.num_images,
            height=options.height,
            width=options.width,
            think=options.think,
            generator=_generators(options.seed, options.num_images),
        )
        total = options.steps or model.defaults.text_to_image.num_inference_steps
        frames = list(_progress(steps, "drawing", total=total))
    files = [(path, encode(one, path)) for path, one in zip(outputs, frames[-1], strict=True)]
    if options.animate is not None:
        files.append((options.animate, animation(frames, options.animate)))
    write(files)


def caption(options: argparse.Namespace) -> None:
    """Images -> one line each; the line starts with the image's path when there are several."""
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
            generator=[_generator(options.seed) for _ in images],  # each as if it were alone
        )
        for path, text in zip(paths, texts, strict=True):
            print(text if len(options.images) == 1 else f"{path}\t{text}", flush=True)


def inpaint(options: argparse.Namespace) -> None:
    """An image, a hole in it and words -> the image with the hole filled."""
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
            "to be drawn anew"
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
    """Text with holes -> the text with words in their place, on stdout."""
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
    """Images and an instruction -> another image."""
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
    """A question, at will about images -> the answer, on stdout."""
    from mmdlm.pipeline.inputs import with_places
    from mmdlm.templates.conversation import check_messages

    images = [_seen(path, options) for path in options.image]
    said = with_places(options.question, len(images))
    check_messages([{"role": "user", "content": said}], len(images))
    model = _load(options, "answer")
    text = model.answer(
        options.question,
        images or None,
        num_inference_steps=options.steps,
        max_new_tokens=options.max_new_tokens,
        block_length=options.block_length,
        temperature=options.temperature,
        guidance_scale=options.guidance_scale,
        think=options.think,
        generator=_generator(options.seed),
    )
    print(text)


def chat(options: argparse.Namespace) -> None:
    """A conversation: each line of stdin is a message, each answer a line or more of stdout."""
    from mmdlm.cli.chat_session import COMMANDS, Conversation

    model = _load(options, "chat")
    generator = _generator(options.seed)

    def speak(messages: list[dict[str, str]], images: list[Image.Image]) -> str:
        text: str = model.chat(
            messages,
            images,
            num_inference_steps=options.steps,
            max_new_tokens=options.max_new_tokens,
            block_length=options.block_length,
            temperature=options.temperature,
            guidance_scale=options.guidance_scale,
            think=options.think,
            generator=generator,
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
    """The beginning of a text -> the whole of it, on stdout."""
    model = _load(options, "complete")
    text = model.complete(
        options.text,
        num_inference_steps=options.steps,
        max_new_tokens=options.max_new_tokens,
        block_length=options.block_length,
        temperature=options.temperature,
        guidance_scale=options.guidance_scale,
        generator=_generator(options.seed),
    )
    print(options.text + text)


def convert(options: argparse.Namespace) -> None:
    """A checkpoint -> the same weights in another format; its folder on stdout."""
    start = options.start
    if len(options.folders) != (1 if start else 2):
        wanted = "OUT alone beside --from" if start else "two folders, IN and OUT"
        raise ValueError(f"convert takes {wanted}, but got {' '.join(map(str, options.folders))}")
    out = Path(options.folders[-1])
    if out.exists():
        raise ValueError(f"{out} exists already; name a folder that does not, or remove it")

    from mmdlm.models.checkpoints.to_diffusion import MASK_TOKEN, convert_to_diffusion
    from mmdlm.pipeline import convert as formats
    from mmdlm.pipeline.loading import find_checkpoint

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
            raise ValueError(f"{strays[0]} goes with --from alone; leave it out")
        shards = formats.convert(options.folders[0], out, to=options.to or formats.OURS)
    _follow(shards, "converting")
    print(out)


# --- the options ----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Errors go to main as ValueError, in one sentence; argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see '{self.prog} --help')")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mmdlm",
        description="One model that draws and describes.",
        epilog="'mmdlm COMMAND --help' lists the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mmdlm {mmdlm.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")

    command = _command(commands, draw, "draw images from words")
    command.add_argument("prompt", type=_words, metavar="PROMPT", help="what to draw")
    _add_output(command)
    command.add_argument(
        "--negative-prompt", type=_text, metavar="TEXT", help="what to stay away from"
    )
    _add_guidance_scale(command)
    command.add_argument(
        "--num-images",
        type=_count,
        default=1,
        metavar="N",
        help="how many to draw; above 1 they are numbered: out-1.png has the --seed N, out-2.png "
        "N + 1 and so on, by which each can be drawn again alone",
    )
    command.add_argument(
        "--animate", type=Path, metavar="FILE", help="show the denoising too: a .gif or .webp file"
    )
    for side in ("--height", "--width"):
        command.add_argument(
            side,
            type=_count,
            metavar="N",
            help="in pixels, for a model that draws in several sizes (default: the model's own)",
        )
    command.add_argument(
        "--think",
        action="store_true",
        help="first write what is to be drawn, where the model was trained to",
    )

    command = _command(commands, caption, "describe images, one line each")
    command.add_argument("images", nargs="+", type=_local, metavar="IMAGE")
    _add_max_pixels(command)

    command = _command(commands, inpaint, "draw a part of an image anew")
    command.add_argument("image", type=_local, metavar="IMAGE")
    hole = command.add_mutually_exclusive_group(required=True)
    hole.add_argument(
        "--mask",
        type=_local,
        metavar="IMAGE",
        help="white where the image is drawn anew, black where it is kept; not transparent",
    )
    hole.add_argument(
        "--box", type=_box, metavar="X0,Y0,X1,Y1", help="the same as a rectangle, in pixels"
    )
    command.add_argument(
        "--prompt",
        type=_words,
        metavar="TEXT",
        help="what the whole image shows (default: whatever fits the rest)",
    )
    _add_output(command)
    _add_guidance_scale(command)
    _add_max_pixels(command)

    command = _command(commands, infill, "fill the gaps in a text")
    command.add_argument(
        "text",
        type=_words,
        metavar="TEXT",
        help='[MASK] is a hole of one token, [MASK:3] of three: "woman [MASK] [MASK] skin tone"',
    )
    command.add_argument(
        "--image", type=_local, metavar="IMAGE", help="an image that the text describes"
    )
    _add_max_pixels(command)

    command = _command(commands, edit, "draw an image anew as an instruction says", bundled=None)
    command.add_argument("images", nargs="+", type=_local, metavar="IMAGE")
    command.add_argument(
        "--prompt", type=_words, required=True, metavar="TEXT", help="what is to change"
    )
    _add_output(command)
    _add_guidance_scale(command)
    command.add_argument(
        "--image-guidance-scale",
        type=_finite,
        metavar="X",
        help="how strongly to stay with the image; 1 is off (default: the model's own value)",
    )
    _add_max_pixels(command)

    command = _command(commands, answer, "answer a question, at will about images", bundled=None)
    command.add_argument("question", type=_words, metavar="QUESTION")
    command.add_argument(
        "--image",
        action="append",
        default=[],
        type=_local,
        metavar="IMAGE",
        help="an image to look at; may be given several times. They stand where the question says "
        "<image>, or else before it",
    )
    _add_writing(command)
    _add_thinking(command)
    _add_max_pixels(command)

    command = _command(commands, chat, "talk, line by line", bundled=None)
    command.epilog = "In it, /image PATH shows an image, /new starts anew and /quit ends."
    command.add_argument(
        "--system", type=_words, metavar="TEXT", help="what the model is told before it all"
    )
    _add_writing(command)
    _add_thinking(command)
    _add_max_pixels(command)

    command = _command(commands, complete, "go on with a text")
    command.add_argument("text", type=_words, metavar="TEXT", help="how it begins")
    _add_writing(command)

    summary = "write a checkpoint in another format"
    command = commands.add_parser(
        "convert",
        usage="mmdlm convert [-h] [--to FAMILY] IN OUT\n"
        "       mmdlm convert --from NAME [--mask-token TOKEN] [--no-shift] [--image-codes N] OUT",
        help=summary,
        description=f"{summary.capitalize()}, bit for bit. With --from, an autoregressive model or "
        "an encoder becomes a denoiser to train on.",
        allow_abbrev=False,
    )
    command.set_defaults(run=convert)
    command.add_argument(
        "folders",
        nargs="+",
        metavar="IN OUT",
        help="a checkpoint (a folder or OWNER/NAME of the Hugging Face Hub) and a new folder",
    )
    command.add_argument(
        "--to", metavar="FAMILY", help=f"{', '.join(FAMILY_NAMES)} (default: our own format)"
    )
    command.add_argument(
        "--from",
        dest="start",
        metavar="NAME",
        help="in place of IN: a Llama, Mistral, Qwen, BERT or ModernBERT checkpoint",
    )
    command.add_argument(
        "--mask-token",
        type=_words,
        metavar="TOKEN",
        help="with --from: the token to add where the tokenizer has none (default: <|mask|>)",
    )
    command.add_argument(
        "--no-shift",
        action="store_true",
        help="with --from: do not keep the autoregressive shift by one token, as Dream does",
    )
    command.add_argument(
        "--image-codes",
        type=_count,
        default=0,
        metavar="N",
        help="with --from: append the ids of an image tokenizer of N codes",
    )
    return parser


def _command(
    commands: argparse._SubParsersAction[Any],
    run: Callable[[argparse.Namespace], None],
    summary: str,
    *,
    bundled: str | None = "emoji",
) -> argparse.ArgumentParser:
    """A command with the options that all of them share.

    bundled  the model that is taken where none is named; None: no bundled one can do it
    """
    command: argparse.ArgumentParser = commands.add_parser(
        run.__name__, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False
    )
    command.set_defaults(run=run)
    command.add_argument(
        "--model",
        default=bundled,
        required=bundled is None,
        metavar="NAME",
        help="a bundled model, a checkpoint folder, a training run (its final weights, or else "
        "its newest step; RUN/step_100 names one), or OWNER/NAME of the Hugging Face Hub "
        "(default: %(default)s)"
        if bundled
        else "a checkpoint folder, a training run (its final weights, or else its newest step; "
        "RUN/step_100 names one), or OWNER/NAME of the Hugging Face Hub: "
        "GSAI-ML/LLaDA-8B-Instruct, for example",
    )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help="to compute in (default: that of the weights, float32 for small models of ours)",
    )
    command.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="hold the weights in fewer bits: 4bit and 8bit by bitsandbytes, the others by torchao",
    )
    command.add_argument(
        "--adapter", metavar="NAME", help="a LoRA by PEFT: a folder or OWNER/NAME of the Hub"
    )
    command.add_argument(
        "--image-tokenizer",
        metavar="NAME",
        help="a folder or OWNER/NAME of the Hub (default: the one in the model's folder, else the "
        "one its family is published with)",
    )
    command.add_argument(
        "--steps",
        type=_count,
        metavar="N",
        help="denoising steps (default: the model's own number)",
    )
    command.add_argument(
        "--cache",
        choices=CACHES,
        help="faster, a little less exact: remember the prompt, what lies before the block "
        "(prefix), all but the block (dual), tokens once they are committed (delayed), or what is "
        "sure (stable, for images)",
    )
    command.add_argument(
        "--cache-refresh",
        type=_count,
        metavar="N",
        help="compute all anew every N steps; 1 is exact (default: as the cache has it)",
    )
    command.add_argument(
        "--threshold",
        type=_finite,
        metavar="P",
        help="commit every token of at least this probability, so that fewer steps are needed",
    )
    command.add_argument(
        "--distinct",
        action="store_true",
        help="with --threshold: of several such tokens of one word commit the first alone",
    )
    command.add_argument(
        "--order",
        metavar="NAME",
        help=f"which tokens are committed first: {', '.join(ORDERS)}, or the class path of an "
        "Order of your own, my_module.MyOrder (default: the model's own)",
    )
    command.add_argument(
        "--schedule",
        metavar="NAME",
        help=f"how many tokens a step commits: {', '.join(SCHEDULES)}, or the class path of a "
        "UnmaskingRule of your own (default: the model's own)",
    )
    command.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="the same seed gives the same result (default: %(default)s)",
    )
    return command


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="for example out.png"
    )


def _add_guidance_scale(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--guidance-scale",
        type=_finite,
        metavar="X",
        help="how strongly to follow the words; 1 is off (default: the model's own value)",
    )


def _add_writing(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-new-tokens",
        type=_count,
        metavar="N",
        help="room for the text (default: the model's own number)",
    )
    command.add_argument(
        "--block-length",
        type=_count,
        metavar="N",
        help="write left to right, so many tokens at a time (default: the model's own number)",
    )
    command.add_argument(
        "--temperature",
        type=_finite,
        metavar="X",
        help="0 takes the likeliest token (default: the model's own value)",
    )
    _add_guidance_scale(command)


def _add_thinking(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        help="ask for reasons first, or for none, where the model was trained for either",
    )


def _add_max_pixels(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-pixels",
        type=_count,
        metavar="N",
        help="the largest image that is read, in pixels (default: 200 million; a third in WebP)",
    )


def _unknown(argument: str, command: str, parser: argparse.ArgumentParser) -> str:
    """What to say of an argument that no command takes."""
    if argument.startswith("-"):
        (commands,) = (one for one in parser._actions if isinstance(one.choices, dict))
        known = commands.choices[command]._option_string_actions  # type: ignore[index]
        name = argument.partition("=")[0]
        near = suggestion(name, [one for one in known if len(one) > 2])
        return f"unknown option {name!r}{near} (see 'mmdlm {command} --help')"
    return (
        f"{command} does not take a further argument {argument!r}; put a text of several words in "
        "quotes, and give several texts one after the other, each to a command of its own"
    )


def _words(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty; give at least one word")
    return _text(text)


def _text(text: str) -> str:
    if text == "-":
        raise argparse.ArgumentTypeError(
            "'-' is no text, and texts are not read from standard input; write the text itself: "
            '"$(cat)" stands for all of standard input'
        )
    if re.fullmatch(r"@\S+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no text, and texts are not read from files; write the text itself: "
            f"\"$(cat {text[1:]})\" stands for a file, and ' {text}' for the letters"
        )
    return _checked(check_whole, text)


def _local(text: str) -> Path:
    """A path, not a URL."""
    from mmdlm.vision.image_files import check_local

    return Path(_checked(check_local, text))


def _checked(check: Callable[[str], None], text: str) -> str:
    try:
        check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")
    return int(text)


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def _box(text: str) -> tuple[int, int, int, int]:
    numbers = [part.strip() for part in text.split(",")]
    if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not four whole numbers x0,y0,x1,y1")
    x0, y0, x1, y1 = map(int, numbers)
    if x0 >= x1 or y0 >= y1:
        raise argparse.ArgumentTypeError(f"{text!r} has no hole: x0 < x1 and y0 < y1 are needed")
    return x0, y0, x1, y1


def _load(options: argparse.Namespace, task: str) -> Model:
    """The model of a command, as its options ask for it; refused early if it lacks the task."""
    import torch

    from mmdlm.core.sampling.order import Order
    from mmdlm.core.sampling.unmasking import UnmaskingRule
    from mmdlm.pipeline.inputs import part_of

    parts = {
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
    model = model.with_generation(
        cache=options.cache,
        cache_refresh=options.cache_refresh,
        threshold=options.threshold,
        distinct=options.distinct or None,
    )
    return replace(model, defaults=model.defaults.in_each_task(**parts)) if parts else model


def _image(path: Path, options: argparse.Namespace, *, whole: bool = False) -> Image.Image:
    from mmdlm.vision.image_files import open_image

    return open_image(path, max_pixels=options.max_pixels, whole=whole)


def _seen(path: Path, options: argparse.Namespace) -> Image.Image:
    """An image file that can be read, and is neither too small nor too narrow to be seen."""
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
    """One for each of several outputs, of this seed and those after it."""
    if count == 1:
        return _generator(seed)
    return [_generator(seed + number) for number in range(count)]


# --- the hole -------------------------------------------------------------------------------------


def _box_mask(box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """White inside the box, black elsewhere, of the image's size (width, height)."""
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


# --- the screen -----------------------------------------------------------------------------------


def _typed(prompt: str) -> str | None:
    """A line from the terminal; None at its end."""
    try:
        return input(prompt).strip()
    except EOFError:
        print(file=sys.stderr)
        return None


def _progress(items: Iterable[Item], what: str, *, total: int) -> Iterable[Item]:
    """A bar with rate and time left on stderr, when that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=what, total=total, leave=False, disable=not sys.stderr.isatty())


def _follow(parts: Iterable[tuple[int, int]], what: str) -> None:
    """The same for work that says (done, total) after each part."""
    from tqdm import tqdm

    with tqdm(desc=what, leave=False, disable=not sys.stderr.isatty()) as bar:
        for done, total in parts:
            bar.total = total
            bar.update(done - bar.n)


if __name__ == "__main__":
    sys.exit(main())
