"""Image files and their bytes -> upright RGB images: the one place where images are decoded.

Six formats are read, each by its own decoder and told from its first bytes, whatever a file is
called: nothing else that Pillow knows, and no program of another party, is ever asked. Metadata
that is damaged or large is left out; an image that is damaged or cut off is refused.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from os import PathLike
from typing import Any, BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

# What Pillow says of damaged metadata, which no image needs, would stand in a progress bar.
warnings.filterwarnings("ignore", module=r"PIL\.\w+ImagePlugin")

Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
BLACK: Color = (0, 0, 0)
MAX_PIXELS = 200_000_000  # at 5 bytes each while they are decoded
WEIGHTS = {"WEBP": 3}  # whose decoder holds 16 bytes a pixel
LARGE = 1 << 26  # pixels above which an image comes smaller, where not all of it is asked for
BAND = 1 << 22  # pixels that are converted at once

FORMATS: dict[str, tuple[re.Pattern[bytes], Callable[[Any], ImageFile.ImageFile]]] = {
    "PNG": (
        re.compile(rb"\x89PNG\r\n\x1a\n"),
        lambda file: PngImagePlugin.PngImageFile(_without_metadata(file)),
    ),
    "JPEG": (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    "WEBP": (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    "GIF": (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    "TIFF": (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImagePlugin.TiffImageFile),
    "BMP": (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
}
NAMES = "PNG, JPEG, WebP, GIF, TIFF, BMP"

ORIENTATION = 0x0112  # tag of EXIF
TURNS = {  # its values -> what sets the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF
SIDEWAYS = (5, 6, 7, 8)  # which exchange width and height
URL = re.compile(r"[a-z][a-z0-9+.-]+:/|data:", re.IGNORECASE)


def open_image(
    source: str | PathLike[str] | bytes,
    *,
    max_pixels: int | None = None,
    whole: bool = False,
    least: int | None = None,
    paper: Color = WHITE,
) -> Image.Image:
    """Read an image file, or the bytes of one, as upright RGB (first frame of an animation).

    16-bit gray values are scaled to 8 bits. An image of more than 67 million pixels is scaled down
    by a whole factor while it is read, for models see much smaller ones.

    Args:
        source: Path of the file, or its content.
        max_pixels: Most pixels of an image that is decoded; None: MAX_PIXELS. A third of it in WebP
            files, whose decoder needs three times the memory.
        whole: Keep the size of every image.
        least: Pixels of the shorter side that are enough: a JPEG file is decoded at a half, a
            quarter or an eighth of its size where so many are left, which is faster.
        paper: Color that transparent pixels show.

    Returns:
        An image of mode RGB.

    Raises:
        ValueError: For what is missing, too large, damaged or of another format; it names the path.
    """
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    if isinstance(source, bytes):
        return _decoded(BytesIO(source), "the image", limit, whole, least, paper)
    with _opened(source) as file:
        return _decoded(file, repr(str(source)), limit, whole, least, paper)


def open_mask(
    source: Image.Image | str | PathLike[str], *, max_pixels: int | None = None
) -> Image.Image:
    """Read a mask: L, 255 where it is white (what is to be drawn again) and 0 where it is black.

    Raises ValueError for what `open_image` refuses, and for a mask in which transparent pixels
    would decide: some programs mean by them what is kept, others what is drawn again.
    """

    def white(paper: Color) -> Image.Image:
        if isinstance(source, Image.Image):
            seen = to_rgb(source, paper=paper)
        else:
            seen = open_image(source, max_pixels=max_pixels, whole=True, paper=paper)
        return seen.convert("L").point(_black_or_white)

    mask = white(BLACK)
    if mask.tobytes() != white(WHITE).tobytes():
        name = "the mask" if isinstance(source, Image.Image) else f"the mask {str(source)!r}"
        raise ValueError(
            f"{name} is transparent in part, which may mean kept or drawn again; save it without "
            "transparency, white where the image is drawn again and black where it is kept"
        )
    return mask


def _black_or_white(gray: int) -> int:
    return 255 if gray >= 128 else 0


def image_format(data: bytes) -> str:
    """Return which of `FORMATS` an image is of, after a look at its header.

    Raises ValueError where `open_image` would, but for damage behind the header.
    """
    return _header(BytesIO(data), "the image", MAX_PIXELS)[0]


def image_facts(data: bytes) -> tuple[int, int, bool]:
    """Return width and height of an image as it is to be seen, and whether it has transparency.

    Raises ValueError where `open_image` would, but for damage behind the header.
    """
    _, image = _header(BytesIO(data), "the image", MAX_PIXELS)
    width, height = image.size
    if _orientation(image) in SIDEWAYS:
        width, height = height, width
    return width, height, bool(image.has_transparency_data)


def to_rgb(image: Image.Image, *, paper: Color = WHITE) -> Image.Image:
    """Any Pillow image -> RGB: turned as its EXIF orientation says, transparency on `paper`.

    16-bit gray values are scaled to 8 bits (Pillow would clip them). Raises ValueError for
    an image that cannot be decoded, and for values without a range: 32-bit integers and floats.
    """
    with _named("the image"):
        image.load()
        return _upright(image, paper)


def check_local(path: str) -> None:
    """Raise ValueError for a URL in place of a path."""
    if URL.match(path):
        raise ValueError(f"{path!r} is a URL; download it first, and give the path of the file")


# --- files ----------------------------------------------------------------------------------------


@contextmanager
def _opened(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    check_local(str(path))
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError as error:
        raise ValueError(f"no image file at {str(path)!r}; check the path") from error
    except IsADirectoryError as error:
        raise ValueError(f"{str(path)!r} is a folder; give one image file in it") from error
    except PermissionError as error:
        raise ValueError(f"no permission to read {str(path)!r}; check its mode") from error
    except (OSError, ValueError) as error:  # a name too long, or one with a zero byte
        raise ValueError(f"cannot open {str(path)!r} ({error}); check the path") from error
    with file:
        yield file


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say of which image it is that a decoder complains; they raise whatever comes to hand."""
    try:
        yield
    except _Unreadable as error:
        raise ValueError(f"cannot read {name} as an image; {error}") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ValueError(
            f"{name} is too large: {error or 'there is not enough memory'}; scale it down, or "
            "raise max_pixels"
        ) from error
    except Exception as error:
        raise ValueError(
            f"cannot read {name} as an image; it is damaged, cut off or of a kind that is not read "
            f"({error})"
        ) from error


class _Unreadable(Exception):
    """Why an image that may well be whole is not read."""


def _header(file: BinaryIO, name: str, max_pixels: int) -> tuple[str, ImageFile.ImageFile]:
    """Return the format and the image, which is not decoded yet."""
    with _named(name):
        start = file.read(16)
        file.seek(0)
        kind = next((kind for kind, (mark, _) in FORMATS.items() if mark.match(start)), None)
        if kind is None:
            raise _Unreadable(f"it is none of {NAMES}" if start else "it is empty")
        image = FORMATS[kind][1](file)
        (width, height), limit = image.size, max_pixels // WEIGHTS.get(kind, 1)
        if width * height > limit:
            raise Image.DecompressionBombError(
                f"{width} x {height} pixels are more than {limit:,}, the limit of {kind} files"
            )
    return kind, image


def _decoded(
    file: BinaryIO, name: str, max_pixels: int, whole: bool, least: int | None, paper: Color
) -> Image.Image:
    _, image = _header(file, name, max_pixels)
    with _named(name):
        if isinstance(image, JpegImagePlugin.JpegImageFile) and not whole:
            _scale_while_decoding(image, least)
        image.load()
        return _upright(image, paper, factor=1 if whole else _factor(image))


def _scale_while_decoding(image: JpegImagePlugin.JpegImageFile, least: int | None) -> None:
    """By 2, 4 or 8, where it is large, or larger than is needed."""
    factor = _factor(image)
    if least is not None:
        factor = max(factor, min(image.size) // least)
    if factor > 1:
        image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))


# --- PNG ------------------------------------------------------------------------------------------

NEEDED = (b"tRNS", b"eXIf")  # of the chunks that a PNG may have or lack
PROFILE = b"Raw profile type exif\0"  # where some programs write EXIF
XMP = b"XML:com.adobe.xmp\0\0\0\0\0"  # not compressed, in no language
TEXT_BYTES = 1 << 20  # that Pillow reads of a text


def _without_metadata(file: BinaryIO) -> BytesIO:
    """Drop color profile, texts and times from a PNG file; keep what makes the image."""
    kept = BytesIO()
    kept.write(file.read(8))
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        is_text = kind in (b"tEXt", b"zTXt", b"iTXt") and length <= TEXT_BYTES
        if is_text or kind in NEEDED or kind[:1].isupper():
            body = file.read(length + 4)
            if not is_text or _turns(kind, body[:-4]):
                kept.write(head + body)
        else:
            file.seek(length + 4, 1)
    kept.seek(0)
    return kept


def _turns(kind: bytes, text: bytes) -> bool:
    """Whether a text may hold an orientation."""
    if kind == b"iTXt":
        return text.startswith(XMP)
    if kind == b"tEXt" or not text.startswith(PROFILE):
        return text.startswith(PROFILE)
    try:
        profile = zlib.decompressobj().decompress(text[len(PROFILE) + 1 :], TEXT_BYTES + 1)
    except zlib.error:
        return False
    return len(profile) <= TEXT_BYTES


# --- colors --------------------------------------------------------------------------------------


def _orientation(image: Image.Image) -> int:
    """Return the orientation in EXIF; 1, upright, where it is missing or damaged."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever its parser comes upon
        return 1


def _upright(image: Image.Image, paper: Color, *, factor: int = 1) -> Image.Image:
    """Turn a decoded image into upright RGB, scaled down by a whole factor."""
    levels = _levels(image)
    if factor == 1:
        rgb = _colors(image, levels, paper)
    else:
        rgb = _reduced(image, factor, levels=levels, paper=paper)
    turn = TURNS.get(_orientation(image))
    upright = rgb if turn is None else rgb.transpose(turn)
    upright.info = {}  # with its orientation it would be turned once more by who reads it next
    return upright


def _levels(image: Image.Image) -> tuple[int, int]:
    """Return the values of gray that are black and white."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0] if image.mode.startswith("I;16") else 16
    white = (1 << bits) - 1
    return (white, 0) if tags.get(PHOTOMETRIC) == 0 else (0, white)


def _colors(image: Image.Image, levels: tuple[int, int], paper: Color) -> Image.Image:
    """Turn an image of any mode, or a part of one, into RGB, as it lies in the file."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = _scaled(image, levels)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise _Unreadable(
            f"its values are {kind}, of which none is known to be white; save it with 8 or 16 bits"
        )
    if image.mode == "La":  # premultiplied gray, which Pillow converts only to LA
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*paper, 255))
        image = Image.alpha_composite(below, image)
    return image.convert("RGB")


def _scaled(image: Image.Image, levels: tuple[int, int]) -> Image.Image:
    """16-bit gray -> L, or LA where one value is transparent."""
    black, white = levels
    table = np.rint((np.arange(1 << 16) - black) * (255 / (white - black)))
    values = np.clip(np.asarray(image), 0, (1 << 16) - 1)
    scaled = Image.fromarray(np.clip(table, 0, 255).astype(np.uint8)[values])
    if isinstance(clear := image.info.get("transparency"), int):
        scaled.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return scaled


def _factor(image: Image.Image) -> int:
    """Return the least whole factor that makes an image no larger than LARGE."""
    factor = 1
    while image.width * image.height > LARGE * factor**2:
        factor += 1
    return factor


def _reduced(
    image: Image.Image, factor: int, *, levels: tuple[int, int], paper: Color
) -> Image.Image:
    """Return the mean of each `factor` x `factor` pixels in RGB, by bands to spare memory."""
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    rows = max(1, BAND // (image.width * factor))
    for row in range(0, small.height, rows):
        top, bottom = row * factor, min((row + rows) * factor, image.height)
        band = image.crop((0, top, image.width, bottom))
        small.paste(_colors(band, levels, paper).reduce(factor), (0, row))
    return small
