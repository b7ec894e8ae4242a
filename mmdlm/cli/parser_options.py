"""Define the options that commands of `mmdlm` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from mmdlm.cli.names import CACHES, DTYPES, ORDERS, PRESETS, QUANTIZATIONS, SCHEDULES
from mmdlm.cli.option_types import count, finite, place, seed


def model_command(
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

    Returns:
        The parser of the command.
    """
    command: argparse.ArgumentParser = commands.add_parser(
        function.__name__,
        help=summary,
        description=f"{summary.capitalize()}.",
        allow_abbrev=False,
    )
    command.set_defaults(run=function)
    add_model(command, bundled)
    command.add_argument(
        "--steps",
        "--num-inference-steps",
        dest="steps",
        type=count,
        metavar="N",
        help="denoising steps (default: the model's own number)",
    )
    add_sampling(command)
    command.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="the same seed gives the same result (default: %(default)s)",
    )
    add_printing(command)
    return command


def add_model(command: argparse.ArgumentParser, bundled: str | None) -> None:
    """Add which model is loaded, and how; `bundled` is taken if none is named."""
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
        "--revision",
        metavar="NAME",
        help="branch, tag or commit of the repository of --model (default: its main branch)",
    )
    command.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)",
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


def add_sampling(command: argparse.ArgumentParser) -> None:
    """Add how the model samples."""
    command.add_argument(
        "--cache",
        choices=CACHES,
        help="faster, a little less exact: remember the prompt, what lies before the block "
        "(prefix), all but the block (dual), tokens once they are committed (delayed), or what is "
        "sure (stable, for images); exact: finished blocks (blocks, for block diffusion)",
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


def add_printing(command: argparse.ArgumentParser) -> None:
    """Add how results are printed."""
    command.add_argument(
        "--json", action="store_true", help="print each result as one line of JSON, in UTF-8"
    )
    command.add_argument(
        "--quiet",
        action="store_true",
        help="print no bars, no notes and no names of files that were written",
    )


def add_output(command: argparse.ArgumentParser, *, default: str) -> None:
    """Add where images are written."""
    command.add_argument(
        "-o",
        "--output",
        type=place,
        metavar="PATH",
        help=f"a file such as out.png, numbered if there are several images, or a folder (default: "
        f"{default} in the current folder, where no file is written over)",
    )


def add_guidance_scale(command: argparse.ArgumentParser) -> None:
    """Add how strongly to follow the words."""
    command.add_argument(
        "--guidance-scale",
        type=finite,
        metavar="X",
        help="how strongly to follow the words; 1 is off (default: the model's own value)",
    )


def add_writing(command: argparse.ArgumentParser) -> None:
    """Add how texts are written."""
    command.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help="room for the text (default: the model's own number)",
    )
    command.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="the text ends before this one; may be given several times",
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
    add_guidance_scale(command)


def add_thinking(command: argparse.ArgumentParser) -> None:
    """Add whether to ask for reasons."""
    command.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        help="ask for reasons first, or for none, where the model was trained for either",
    )


def add_max_pixels(command: argparse.ArgumentParser) -> None:
    """Add the largest image that is read."""
    command.add_argument(
        "--max-pixels",
        type=count,
        metavar="N",
        help="the largest image that is read, in pixels (default: 200 million; a third in WebP)",
    )
