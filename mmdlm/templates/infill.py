"""Read texts as users write them: their holes, whole characters, and how errors show them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that a text is looked at before torch is loaded
    from torch import Tensor

HOLE = re.compile(r"\[MASK(?::(\d+))?\]")


def split_at_holes(text: str) -> tuple[list[tuple[str, int]], str]:
    """Split a text into (what stands before each hole and its tokens, what stands at the end).

    Holes side by side are one.

    Args:
        text: With holes such as [MASK] or [MASK:5].

    Returns:
        The pieces before the holes, each with the tokens of its hole, and the last piece.

    Raises:
        ValueError: For a text without a hole, and for a hole of no tokens.
    """
    before: list[tuple[str, int]] = []
    end = 0
    for match in HOLE.finditer(text):
        length = int(match[1] or 1)
        if length < 1:
            raise ValueError(f"{match[0]} in {text!r} is a hole of no tokens; give it at least one")
        outside = text[end : match.start()]
        if before and not outside:
            before[-1] = (before[-1][0], before[-1][1] + length)
        else:
            before.append((outside, length))
        end = match.end()
    if not before:
        raise ValueError(
            f"text {text!r} has no hole; write [MASK] for each token to fill in, or [MASK:3] for "
            "three"
        )
    return before, text[end:]


def filled_text(text: str, ids: Tensor, *, decode: Callable[[Tensor], str]) -> str:
    """Put the ids that fill the holes of a text, in their order, into it.

    What stands outside the holes comes back character by character. At the ends of the text a hole
    brings no space.

    Args:
        text: With holes.
        ids: That fill them.
        decode: Decodes ids that follow a text, with the space that they bring.

    Returns:
        The text without holes.
    """
    before, after = split_at_holes(text)
    said = [decode(filling) for filling in ids.split([length for _, length in before])]
    if not before[0][0]:
        said[0] = said[0].lstrip()
    if not after:
        said[-1] = said[-1].rstrip()
    whole = ""
    for (outside, _), filling in zip(before, said, strict=True):
        shown = without_blank(outside)
        blank = outside[len(shown) :]
        whole += shown + (filling if filling.startswith(blank) else blank + filling)
    return whole + after


def without_blank(outside: str) -> str:
    """Return what a model sees before a hole: all but a blank that parts it from the hole."""
    single = outside.endswith(" ") and not outside[:-1].endswith((" ", "\t", "\n", "\r"))
    return outside[:-1] if single else outside


def check_whole(text: str) -> None:
    """Raise ValueError for a text with half a character, which no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {shortened(text)!r} holds half a character at place {error.start} (it was cut "
            "within an emoji, or is not UTF-8); write it whole"
        ) from None


def shortened(text: str) -> str:
    """Cut a text to what an error shows of it."""
    return text if len(text) <= 60 else text[:59] + "\N{HORIZONTAL ELLIPSIS}"
