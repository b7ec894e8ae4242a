"""Build the parser of the command `mmdlm`: its commands and their options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import mmdlm
from mmdlm.cli import about
from mmdlm.cli import commands as run
from mmdlm.cli.names import FAMILY_NAMES, SHELLS
from mmdlm.cli.option_types import box, count, finite, literal_text, local, words
from mmdlm.cli.parser_options import (
    add_guidance_scale,
    add_max_pixels,
    add_output,
    add_printing,
    add_thinking,
    add_writing,
    model_command,
)
from mmdlm.cli.serve import add_serve
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

    command = model_command(commands, run.draw, "draw images from words")
    command.add_argument(
        "prompts",
        nargs="+",
        metavar="PROMPT",
        help="what to draw; - for standard input and @FILE for a file, a prompt a line",
    )
    add_output(command, default="the words of the prompt, red-heart.png,")
    command.add_argument(
        "--negative-prompt", type=literal_text, metavar="TEXT", help="what to stay away from"
    )
    add_guidance_scale(command)
    command.add_argument(
        "--num-images",
        type=count,
        default=1,
        metavar="N",
        help="how many to draw of each prompt; above 1 they are numbered: out-1.png has the --seed "
        "N, out-2.png N + 1 and so on, by which each can be drawn again",
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

    command = model_command(commands, run.caption, "describe images, one line each")
    command.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, an http(s) URL, a folder for all images in it, - for a list of files on "
        "standard input, @FILE for one in a file",
    )
    add_max_pixels(command)

    command = model_command(commands, run.inpaint, "draw a part of an image again")
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
    command.add_argument(
        "--strength",
        type=finite,
        default=1.0,
        metavar="X",
        help="share of the masked codes that are drawn again, up to 1 (default: %(default)s)",
    )
    add_output(command, default="IMAGE-inpainted.png")
    add_guidance_scale(command)
    add_max_pixels(command)

    command = model_command(commands, run.infill, "fill the gaps in a text")
    command.add_argument(
        "texts",
        nargs="+",
        metavar="TEXT",
        help='[MASK] is a hole of one token, [MASK:3] of three: "woman [MASK] [MASK] skin tone"; - '
        "for all of standard input, @FILE for a file",
    )
    command.add_argument(
        "--image", type=local, metavar="IMAGE", help="an image that the text describes"
    )
    add_max_pixels(command)

    command = model_command(
        commands, run.edit, "draw an image again as an instruction says", bundled=None
    )
    command.add_argument("images", nargs="+", type=local, metavar="IMAGE")
    command.add_argument(
        "--prompt", type=words, required=True, metavar="TEXT", help="what is to change"
    )
    add_output(command, default="IMAGE-edited.png")
    add_guidance_scale(command)
    command.add_argument(
        "--image-guidance-scale",
        type=finite,
        metavar="X",
        help="how strongly to stay with the image; 1 is off (default: the model's own value)",
    )
    add_max_pixels(command)

    command = model_command(
        commands, run.answer, "answer a question, about images or not", bundled=None
    )
    command.add_argument(
        "questions",
        nargs="+",
        metavar="QUESTION",
        help="- for standard input and @FILE for a file, a question a line; all are asked about "
        "the same images",
    )
    command.add_argument(
        "--image",
        action="append",
        default=[],
        type=local,
        metavar="IMAGE",
        help="an image to look at; may be given several times. They stand where the question says "
        "<image>, or else before it",
    )
    add_writing(command)
    add_thinking(command)
    add_max_pixels(command)

    command = model_command(commands, run.chat, "talk, line by line", bundled=None)
    command.epilog = "In it, /image PATH shows an image, /new starts again and /quit ends."
    command.add_argument(
        "--system", type=words, metavar="TEXT", help="what the model is told before it all"
    )
    add_writing(command)
    add_thinking(command)
    add_max_pixels(command)

    command = model_command(commands, run.complete, "go on with a text")
    command.add_argument(
        "texts",
        nargs="+",
        metavar="TEXT",
        help="how it begins; - for all of standard input, @FILE for a file",
    )
    add_writing(command)

    summary = "write a checkpoint in another format"
    command = commands.add_parser(
        "convert",
        usage="mmdlm convert [-h] [--to FAMILY] IN OUT\n"
        "       mmdlm convert --from NAME [--mask-token TOKEN] [--no-shift] "
        "[--block-length N]\n"
        "                     [--image-codes N] OUT",
        help=summary,
        description=f"{summary.capitalize()}, bit for bit. With --from, an autoregressive model or "
        "an encoder becomes a denoiser to train on.",
        allow_abbrev=False,
    )
    command.set_defaults(run=run.convert)
    add_printing(command)
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
        "--block-length",
        type=count,
        metavar="N",
        help="with --from an autoregressive model: block diffusion in blocks of N tokens, which "
        "see no later ones",
    )
    command.add_argument(
        "--image-codes",
        type=count,
        default=0,
        metavar="N",
        help="with --from: append the ids of an image tokenizer of N codes",
    )
    add_serve(commands)
    _add_about(commands)
    return parser


def _add_about(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the commands that run no model."""
    summary = "list the models that can be had: memory, license, commands"
    command = commands.add_parser(
        "models", help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False
    )
    command.set_defaults(run=about.models)
    command.add_argument("--json", action="store_true", help="print each as one line of JSON")

    summary = "print a script by which a shell completes commands, options and files"
    command = commands.add_parser(
        "completion", help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False
    )
    command.set_defaults(run=about.completion, parser=build_parser)
    command.add_argument("shell", choices=SHELLS)
    command.epilog = 'bash: eval "$(mmdlm completion bash)"; zsh: write it to a file named _mmdlm'

    for name, what in (("train", "training"), ("eval", "evaluation")):
        summary = f"say where {what} lives: it runs from a checkout"
        command = commands.add_parser(
            name, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False
        )
        command.set_defaults(run=about.elsewhere, takes_anything=True)
        command.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """Return arguments with dashes in the names of options, as `--num_inference_steps` has none."""
    found: list[str] = []
    for number, one in enumerate(arguments):
        if one == "--":
            return [*found, *arguments[number:]]
        name, equals, value = one.partition("=")
        is_option = re.fullmatch(r"--\w[\w-]*", name) is not None
        found.append(f"{name.replace('_', '-')}{equals}{value}" if is_option else one)
    return found


def explain_unknown(argument: str, command: str, parser: argparse.ArgumentParser) -> str:
    """Say what is wrong with an argument that no command takes."""
    if argument.startswith("-"):
        (commands,) = (one for one in parser._actions if isinstance(one.choices, dict))
        known = commands.choices[command]._option_string_actions  # type: ignore[index]
        name = argument.partition("=")[0]
        near = suggestion(name, [one for one in known if len(one) > 2])
        return f"unknown option {name!r}{near} (see 'mmdlm {command} --help')"
    return (
        f"{command} does not take the argument {argument!r} there; put a text of several words in "
        "quotes, and all texts and files before the options"
    )
