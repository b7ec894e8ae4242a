"""Read the values of options; a bad one is an argparse.ArgumentTypeError in one sentence."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from mmdlm.templates.infill import check_whole

MOST_SEEDS = 2**63


def words(text: str) -> str:
    """Read a text of at least one word."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty; give at least one word")
    return literal_text(text)


def literal_text(text: str) -> str:
    """Read a text as it stands; refuse what stands for a file elsewhere."""
    if text == "-":
        raise argparse.ArgumentTypeError(
            "'-' is no text, and this one is not read from standard input; write the text itself: "
            '"$(cat)" stands for all of standard input'
        )
    if re.fullmatch(r"@\S+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no text, and this one is not read from a file; write the text itself: "
            f"\"$(cat {text[1:]})\" stands for a file, and ' {text}' for the letters"
        )
    return _checked(check_whole, text)


def local(text: str) -> Path:
    """Read a path that is not a URL."""
    from mmdlm.vision.image_files import check_local

    return Path(_checked(check_local, text))


def place(text: str) -> Path:
    """Read the path of a file or folder that is written."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a path is empty; name a file or a folder")
    if text.endswith(("/", os.sep)) and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}; create it")
    return Path(text)


def _checked(check: Callable[[str], None], text: str) -> str:
    try:
        check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """Read a seed, from 0 to 2**63 - 1."""
    if not text.isdecimal() or int(text) >= MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")
    return int(text)


def finite(text: str) -> float:
    """Read a finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def box(text: str) -> tuple[int, int, int, int]:
    """Read a rectangle x0,y0,x1,y1, in pixels."""
    numbers = [part.strip() for part in text.split(",")]
    if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not four whole numbers x0,y0,x1,y1")
    x0, y0, x1, y1 = map(int, numbers)
    if x0 >= x1 or y0 >= y1:
        raise argparse.ArgumentTypeError(f"{text!r} has no hole: x0 < x1 and y0 < y1 are needed")
    return x0, y0, x1, y1
