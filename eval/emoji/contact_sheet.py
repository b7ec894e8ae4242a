"""A page to look at: cards with two images side by side, a name, and what is said of them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER, CARD, INK, FAINT = "#eceae6", "#ffffff", "#22211f", "#8d8a84"
GOOD, FAIR, POOR = "#2f7d4f", "#a8741a", "#b3402e"
COLUMNS, EDGE, GAP, PAD = 6, 128, 16, 12  # cards a row, and pixels


@dataclass(frozen=True)
class Card:
    """Two images side by side, the name, and lines of (text, color) under it."""

    left: Image.Image
    right: Image.Image
    name: str
    notes: tuple[tuple[str, str], ...]


def sheet_of(
    cards: Sequence[Card], title: str, lines: Sequence[str], *, heads: tuple[str, str]
) -> Image.Image:
    """Draw a page of cards under a title, lines of text, and heads over the images of a card."""
    big, medium, small = (ImageFont.load_default(size) for size in (34, 16, 14))
    notes = max(len(card.notes) for card in cards)
    width, height = 2 * EDGE + 3 * PAD, EDGE + 84 + 19 * notes
    columns = min(COLUMNS, len(cards))
    rows = math.ceil(len(cards) / columns)
    top = 84 + 24 * len(lines)
    page_width = max(columns * (width + GAP) + GAP, 1180)
    page = Image.new("RGB", (page_width, top + rows * (height + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((GAP + 4, 20), title, font=big, fill=INK)
    for n, line in enumerate(lines):
        pen.text((GAP + 4, 70 + 24 * n), _plain(line), font=medium, fill=FAINT)
    for n, card in enumerate(cards):
        x = GAP + n % columns * (width + GAP)
        y = top + n // columns * (height + GAP)
        pen.rounded_rectangle((x, y, x + width - 1, y + height - 1), radius=10, fill=CARD)
        for image, head, left in (
            (card.left, heads[0], x + PAD),
            (card.right, heads[1], x + 2 * PAD + EDGE),
        ):
            pen.text((left + EDGE / 2, y + 15), head, font=small, fill=FAINT, anchor="mm")
            page.paste(image.resize((EDGE, EDGE), Image.Resampling.LANCZOS), (left, y + 28))
        y += EDGE + 36
        for line in _wrapped(card.name, medium, width - 2 * PAD, lines=2):
            pen.text((x + PAD, y), line, font=medium, fill=INK)
            y += 20
        y = top + n // columns * (height + GAP) + EDGE + 79
        for note, color in card.notes:
            (line,) = _wrapped(note, small, width - 2 * PAD, lines=1)
            pen.text((x + PAD, y), line, font=small, fill=color)
            y += 19
    return page


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, *, lines: int
) -> list[str]:
    """Text in at most `lines` lines of at most `width` pixels; what does not fit ends in dots."""
    found = [""]
    for word in _plain(text).split():
        longer = f"{found[-1]} {word}".strip()
        if font.getlength(longer) <= width or not found[-1]:
            found[-1] = longer
        else:
            found.append(word)
    if len(found) > lines:
        found = [*found[: lines - 1], " ".join(found[lines - 1 :])]
    last = found[-1]
    while font.getlength(found[-1]) > width and last:
        last = last[:-1]
        found[-1] = last.rstrip() + "..."
    return found


def _plain(text: str) -> str:
    """Without accents, which the font that comes with Pillow does not have."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
