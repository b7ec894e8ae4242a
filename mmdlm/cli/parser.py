"""Build the parser of the command `mmdlm`: its commands and their options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import mmdlm
from mmdlm.cli import commands as run
from mmdlm.cli.names import (
    CACHES,
    DTYPES,
    FAMILY_NAMES,
    ORDERS,
    PRESETS,
    QUANTIZATIONS,
    SCHEDULES,
)
from mmdlm.cli.option_types import box, count, finite, literal_text, local, seed, words
from mmdlm.vision.known_names import suggestion

INVALID_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)$")


class _Parser(argparse.ArgumentParser):
    """Raise errors as ValueError, in one sentence; argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as ValueError; of a choice with the nearest one."""
        if (match := INVALID_CHOICE.search(message)) is not None:
            near = suggestion(match[1], re.findall(r"[\w-]+", match[2]))
            message = f"{message}{near}"
        raise ValueError(f"{message} (see '{self.prog} --help')")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command `mmdlm` and its subcommands."""
    parser = _Parser(
        prog="mmdlm",
        description="One model that draws and describes.",
        epilog="'mmdlm COMMAND --help' lists the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mmdlm {mmdlm.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")

    command = _command(commands, run.draw, "draw images from words")
    command.add_argument("prompt", type=words, metavar="PROMPT", help="what to draw")
    _add_output(command)
    command.add_argument(
        "--negative-prompt", type=literal_text, metavar="TEXT", help="what to stay away from"
    )
    _add_guidance_scale(command)
    command.add_argument(
        "--num-images",
        type=count,
        default=1,
        metavar="N",
        help="how many to draw; above 1 they are numbered: out-1.png has the --seed N, out-2.png "
        "N + 1 and so on, by which each can be drawn again",
    )
    command.add_argument(
        "--animate", type=Path, metavar="FILE", help="show the denoising too: a .gif or .webp file"
    )
    for side in ("--height", "--width"):
        command.add_argument(
            side,
            type=count,
            metavar="N",
            help="in pixels, for a model that draws in several sizes (default: the model's own)",
        )
    command.add_argument(
        "--think",
        action="store_true",
        help="first write what is to be drawn, where the model was trained to",
    )

    command = _command(commands, run.caption, "describe images, one line each")
    command.add_argument("images", nargs="+", type=local, metavar="IMAGE")
    _add_max_pixels(command)

    command = _command(commands, run.inpaint, "draw a part of an image again")
    command.add_argument("image", type=local, metavar="IMAGE")
    hole = command.add_mutually_exclusive_group(required=True)
    hole.add_argument(
        "--mask",
        type=local,
        metavar="IMAGE",
        help="white where the image is drawn again, black where it is kept; not transparent",
    )
    hole.add_argument(
        "--box", type=box, metavar="X0,Y0,X1,Y1", help="the same as a rectangle, in pixels"
    )
    command.add_argument(
        "--prompt",
        type=words,
        metavar="TEXT",
        help="what the whole image shows (default: whatever fits the rest)",
    )
    _add_output(command)
    _add_guidance_scale(command)
    _add_max_pixels(command)

    command = _command(commands, run.infill, "fill the gaps in a text")
    command.add_argument(
        "text",
        type=words,
        metavar="TEXT",
        help='[MASK] is a hole of one token, [MASK:3] of three: "woman [MASK] [MASK] skin tone"',
    )
    command.add_argument(
        "--image", type=local, metavar="IMAGE", help="an image that the text describes"
    )
    _add_max_pixels(command)

    command = _command(
        commands, run.edit, "draw an image again as an instruction says", bundled=None
    )
    command.add_argument("images", nargs="+", type=local, metavar="IMAGE")
    command.add_argument(
        "--prompt", type=words, required=True, metavar="TEXT", help="what is to change"
    )
    _add_output(command)
    _add_guidance_scale(command)
    command.add_argument(
        "--image-guidance-scale",
        type=finite,
        metavar="X",
        help="how strongly to stay with the image; 1 is off (default: the model's own value)",
    )
    _add_max_pixels(command)

    command = _command(commands, run.answer, "answer a question, about images or not", bundled=None)
    command.add_argument("question", type=words, metavar="QUESTION")
    command.add_argument(
        "--image",
        action="append",
        default=[],
        type=local,
        metavar="IMAGE",
        help="an image to look at; may be given several times. They stand where the question says "
        "<image>, or else before it",
    )
    _add_writing(command)
    _add_thinking(command)
    _add_max_pixels(command)

    command = _command(commands, run.chat, "talk, line by line", bundled=None)
    command.epilog = "In it, /image PATH shows an image, /new starts again and /quit ends."
    command.add_argument(
        "--system", type=words, metavar="TEXT", help="what the model is told before it all"
    )
    _add_writing(command)
    _add_thinking(command)
    _add_max_pixels(command)

    command = _command(commands, run.complete, "go on with a text")
    command.add_argument("text", type=words, metavar="TEXT", help="how it begins")
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
    command.set_defaults(run=run.convert)
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
        type=words,
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
        type=count,
        default=0,
        metavar="N",
        help="with --from: append the ids of an image tokenizer of N codes",
    )
    return parser


def _command(
    commands: argparse._SubParsersAction[Any],
    function: Callable[[argparse.Namespace], None],
    summary: str,
    *,
    bundled: str | None = "emoji",
) -> argparse.ArgumentParser:
    """Add a command with the options that all of them share.

    Args:
        commands: Where it is added.
        function: What it runs; its name is that of the command.
        summary: What it does, for the help.
        bundled: Model that is taken if none is named; None: no bundled one can do it.
    """
    command: argparse.ArgumentParser = commands.add_parser(
        function.__name__,
        help=summary,
        description=f"{summary.capitalize()}.",
        allow_abbrev=False,
    )
    command.set_defaults(run=function)
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
        type=count,
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
        type=count,
        metavar="N",
        help="compute everything again every N steps; 1 is exact (default: as the cache has it)",
    )
    command.add_argument(
        "--threshold",
        type=finite,
        metavar="P",
        help="commit every token of at least this probability, so that fewer steps are needed",
    )
    command.add_argument(
        "--distinct",
        action="store_true",
        help="with --threshold: of several such tokens of one word commit only the first",
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
        help=f"how many tokens a step commits: {', '.join(SCHEDULES)} (the same number each; few "
        "at first; few at first, by LaViDa's shift; each open token on its own), or the class path "
        "of an UnmaskingRule of your own (default: the model's own)",
    )
    command.add_argument(
        "--reproduce",
        choices=PRESETS,
        help="sample as the published code of this model does: the tokens of a step, top-p before "
        "top-k (default: the model's own way)",
    )
    command.add_argument(
        "--published-defects",
        action="store_true",
        help="with --reproduce: also what that code does wrong: a text may get any id, the mask "
        "token may be drawn, noise in the order may compound",
    )
    command.add_argument(
        "--seed",
        type=seed,
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
        type=finite,
        metavar="X",
        help="how strongly to follow the words; 1 is off (default: the model's own value)",
    )


def _add_writing(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help="room for the text (default: the model's own number)",
    )
    command.add_argument(
        "--block-length",
        type=count,
        metavar="N",
        help="write left to right, so many tokens at a time (default: the model's own number)",
    )
    command.add_argument(
        "--temperature",
        type=finite,
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
        type=count,
        metavar="N",
        help="the largest image that is read, in pixels (default: 200 million; a third in WebP)",
    )


def explain_unknown(argument: str, command: str, parser: argparse.ArgumentParser) -> str:
    """Say what is wrong with an argument that no command takes."""
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
