"""The emoji data set: every emoji that a color font draws as one glyph, with its names."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import emoji as emoji_package
from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from data_pipelines.sources.emoji_facts import Facts, tones_of, without_skin_tones
from data_pipelines.sources.icon_sets import IconSet

NOTO = "noto"  # the style of the font, which a prompt need not name
HELD_OUT_IN_A_STYLE = 300
REFERENCE = "\N{GRINNING FACE}"  # every color font has it; its advance is that of one glyph
UNASSIGNED = "\U0010fffd"  # what a font draws for a character that it does not know
# Bitmap fonts exist at a few sizes only: Noto (CBDT) at 109, Apple (sbix) at 160 and below.
FONT_SIZES = (109, 160, 136, 128, 96, 64)
USUAL_FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",  # Fedora
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "~/.fonts/NotoColorEmoji.ttf",
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",  # macOS
    "C:/Windows/Fonts/seguiemj.ttf",
)


@dataclass(frozen=True)
class Emoji:
    """One emoji, drawn in one style.

    Attributes:
        name: English, with spaces for underscores: "woman firefighter medium-dark skin tone".
        names: Language (ISO 639-1) -> name, English among them.
        aliases: Short names in use elsewhere ("grinning").
        characters: The code points as a string.
        image: RGB on white, square.
        held_out: Kept away from training in all styles: see `is_held_out`.
        style: Of the image: "noto" for the font, else that of an icon set.
        held_out_style: Kept away from training in only this style: see `held_out_styles`.
        facts: What Unicode data says; None where it was not read or does not know the emoji.
    """

    name: str
    names: dict[str, str]
    aliases: tuple[str, ...]
    characters: str
    image: Image.Image
    held_out: bool
    style: str = NOTO
    held_out_style: bool = False
    facts: Facts | None = None

    @property
    def code_points(self) -> tuple[int, ...]:
        """The code points as numbers."""
        return tuple(map(ord, self.characters))

    @property
    def key(self) -> str:
        """Code points in hexadecimal, joined by "-", behind the style: a name for files."""
        points = "-".join(f"{point:x}" for point in self.code_points)
        return points if self.style == NOTO else f"{self.style}-{points}"

    @property
    def caption(self) -> str:
        """The text that draws it: its name, and its style where that is not the font's."""
        return caption_of(self.name, self.style)

    @property
    def split(self) -> str:
        """Where it belongs: "train", "held_out" or "held_out_style"."""
        if self.held_out:
            return "held_out"
        return "held_out_style" if self.held_out_style else "train"


@dataclass(frozen=True)
class LeftOut:
    """An emoji that the font does not draw as one glyph, and why."""

    name: str
    characters: str
    reason: str


def emoji_images(font: Path | None = None, *, size: int = 64) -> list[Emoji]:
    """Every fully-qualified emoji that `font` (default: `find_font`) draws as one glyph."""
    return [drawn for drawn in draw_emoji(font, size=size) if isinstance(drawn, Emoji)]


def draw_emoji(font: Path | None = None, *, size: int = 64) -> Iterator[Emoji | LeftOut]:
    """Draw all fully-qualified emoji of the `emoji` package, in its order, `size` pixels square.

    Raises ValueError where no color font is found, or Pillow cannot join code points to a glyph.
    """
    return _drawn(_load(font or find_font()), size)


def _drawn(face: ImageFont.FreeTypeFont, size: int) -> Iterator[Emoji | LeftOut]:
    side, left, top = _canvas(face)
    blank = _draw(face, UNASSIGNED, side, left, top)
    emoji_package.config.load_language()  # all of them; only English is there before
    for characters in fully_qualified():
        entry = emoji_package.EMOJI_DATA[characters]
        names = {
            language: _readable(entry[language])
            for language in emoji_package.LANGUAGES
            if language in entry
        }
        # A sequence that the font does not know comes out as its parts, side by side.
        glyphs = face.getlength(characters) / face.getlength(REFERENCE)
        if abs(glyphs - 1) > 0.01:
            yield LeftOut(names["en"], characters, f"drawn as {glyphs:.0f} glyphs")
            continue
        image = _draw(face, characters, side, left, top)
        if image.tobytes() == blank.tobytes():
            yield LeftOut(names["en"], characters, "not in the font")
            continue
        yield Emoji(
            name=names["en"],
            names=names,
            aliases=tuple(_readable(alias) for alias in entry.get("alias", [])),
            characters=characters,
            image=image.resize((size, size), Image.Resampling.LANCZOS),
            held_out=is_held_out(characters),
        )


def fully_qualified() -> list[str]:
    """All emoji of the `emoji` package in the form that is meant for display."""
    wanted = emoji_package.STATUS["fully_qualified"]
    return [c for c, entry in emoji_package.EMOJI_DATA.items() if entry["status"] == wanted]


def is_held_out(characters: str) -> bool:
    """Return whether an emoji is held out, to measure whether a model composes.

    The sequence has a skin-tone modifier, and sha256 of it in UTF-8 is divisible by 10.
    """
    digest = hashlib.sha256(characters.encode()).hexdigest()
    return bool(tones_of(characters)) and int(digest, 16) % 10 == 0


def caption_of(name: str, style: str) -> str:
    """Return the text of an emoji in a style; a name alone is in the style of the font."""
    return name if style == NOTO else f"{name} in {style} style"


def in_styles(emoji: Iterable[Emoji], icon_sets: Iterable[IconSet]) -> list[Emoji]:
    """Return the same emoji in each style of some icon sets, as far as those have them.

    `HELD_OUT_IN_A_STYLE` of them are held out in their style: those with the least sha256 of
    style and characters, of the emoji that are trained in the style of the font.
    """
    drawn = []
    for one in emoji:
        for icons in icon_sets:
            image = icons.draw(one.characters, size=one.image.width)
            if image is not None:
                drawn.append(replace(one, image=image, style=icons.style))
    trained = [one for one in drawn if not one.held_out]
    trained.sort(key=lambda one: hashlib.sha256(one.key.encode()).digest())
    kept_away = {one.key for one in trained[:HELD_OUT_IN_A_STYLE]}
    return [replace(one, held_out_style=one.key in kept_away) for one in drawn]


def sampling_weights(images: Iterable[Emoji]) -> dict[str, float]:
    """Return, by key, weights under which a person in all skin tones counts as one thing does.

    Emoji with skin tones that differ in nothing else share a weight of 1 among those of them that
    are given; an emoji without a skin tone has 1.
    """
    images = list(images)
    sizes = Counter(_subject(one) for one in images if tones_of(one.characters))
    return {
        one.key: 1 / sizes[_subject(one)] if tones_of(one.characters) else 1.0 for one in images
    }


def _subject(emoji: Emoji) -> tuple[str, str]:
    return emoji.style, without_skin_tones(emoji.name)


def alike_names(images: Iterable[Emoji]) -> dict[str, frozenset[str]]:
    """Name -> all names whose image is the same pixel for pixel, itself among them."""
    images = list(images)
    by_pixels: dict[bytes, set[str]] = defaultdict(set)
    for drawn in images:
        by_pixels[drawn.image.tobytes()].add(drawn.name)
    return {drawn.name: frozenset(by_pixels[drawn.image.tobytes()]) for drawn in images}


def find_font() -> Path:
    """Return a color emoji font of this machine; ValueError, with the way to get one, for none."""
    for place in USUAL_FONTS:
        path = Path(place).expanduser()
        if path.is_file():
            return path
    try:
        found = subprocess.run(
            ["fc-list", ":color=true:charset=1f600", "file"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    for line in sorted(found.splitlines()):
        path = Path(line.strip().rstrip(":"))
        if path.is_file():
            return path
    raise ValueError(
        "no color emoji font found; install one (Debian, Ubuntu: apt-get install "
        "fonts-noto-color-emoji) or name its file with --font"
    )


def _load(font: Path) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise ValueError(
            "this Pillow has no RAQM text layout, without which emoji of several code points come "
            "apart; install Pillow's own wheel, which has it: pip install --force-reinstall pillow"
        )
    if not Path(font).is_file():
        raise ValueError(f"font {font}: no such file")
    for size in FONT_SIZES:
        try:
            face = ImageFont.truetype(str(font), size, layout_engine=ImageFont.Layout.RAQM)
        except OSError:
            continue
        if face.getlength(REFERENCE) > 0:
            return face
    raise ValueError(f"font {font}: cannot be read as a font with emoji; name a color emoji font")


def _canvas(face: ImageFont.FreeTypeFont) -> tuple[int, int, int]:
    """Side of the square that holds one glyph, and where in it text starts."""
    left, top, right, bottom = face.getbbox(REFERENCE)
    side = math.ceil(max(right - left, bottom - top))
    return side, round((side - right - left) / 2), round((side - bottom - top) / 2)


def _draw(
    face: ImageFont.FreeTypeFont, characters: str, side: int, left: int, top: int
) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    pen.text((left, top), characters, font=face, fill="black", embedded_color=True)
    return image


def _readable(name: str) -> str:
    return name.strip(":").replace("_", " ")


def draw_with_report(
    font: Path | None = None, *, size: int = 64
) -> tuple[list[Emoji], list[LeftOut]]:
    """`draw_emoji`, with a progress bar; says on stderr which emoji the font has left out."""
    total = len(fully_qualified())
    bar = tqdm(draw_emoji(font, size=size), total=total, desc="drawing", unit=" emoji")
    images: list[Emoji] = []
    left_out: list[LeftOut] = []
    for one in bar:
        if isinstance(one, Emoji):
            images.append(one)
        else:
            left_out.append(one)
    if left_out:
        listed = ", ".join(f"{one.name} ({one.reason})" for one in left_out)
        print(f"left out {len(left_out)} of {total}: {listed}", file=sys.stderr)
    return images, left_out
