"""Write images and animations to files, each whole or not at all.

Pillow is imported where it is used, so that `mmdlm --help` is instant.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mmdlm.atomic_files import atomic_write_all
from mmdlm.pipeline.limits import MOST_IMAGES

if TYPE_CHECKING:
    from PIL import Image

FRAME_MS = 120
LAST_FRAME_MS = 2000
IMAGE_FORMATS = {  # a file's ending -> Pillow's name
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
ANIMATED_FORMATS = {".gif": "GIF", ".webp": "WEBP"}


def numbered(path: Path, count: int) -> list[Path]:
    """Return [out.png], or [out-1.png, out-2.png, ...]."""
    if count > MOST_IMAGES:
        raise ValueError(f"{count:,} images are too many; take at most {MOST_IMAGES:,}")
    if count == 1 or not path.name:
        return [path]
    return [path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, count + 1)]


def check_place(path: Path, option: str, formats: dict[str, str]) -> None:
    """Refuse before the slow work a result that would have no place or no format."""
    if not path.name:
        raise ValueError(f"{option} is empty; name a file that ends in one of {' '.join(formats)}")
    if path.suffix.lower() not in formats:
        raise ValueError(
            f"{option} {str(path)!r} does not end in one of {' '.join(formats)}; "
            f"try {str(path.with_suffix(next(iter(formats))))!r}"
        )
    if path.is_dir():
        raise ValueError(f"{option} {str(path)!r} is a folder; name a file in it")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{option} {str(path)!r}: there is no folder {str(folder)!r}; create it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"{option} {str(path)!r}: the folder {str(folder)!r} may not be written to; "
            "choose another"
        )


def encode(image: Image.Image, path: Path) -> bytes:
    """Encode an image in the format that the ending of its file names."""
    buffer = io.BytesIO()
    image.save(buffer, IMAGE_FORMATS[path.suffix.lower()], quality=95)
    return buffer.getvalue()


def animation(frames: Sequence[list[Image.Image]], path: Path) -> bytes:
    """Encode one frame for each denoising step, its images side by side; the last stays longer."""
    sheets = [_side_by_side(images) for images in frames]
    durations = [FRAME_MS] * (len(sheets) - 1) + [LAST_FRAME_MS]
    buffer = io.BytesIO()
    sheets[0].save(
        buffer,
        ANIMATED_FORMATS[path.suffix.lower()],
        save_all=True,
        append_images=sheets[1:],
        duration=durations,
        loop=0,
    )
    return buffer.getvalue()


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    from PIL import Image

    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(images), height))
    for n, image in enumerate(images):
        sheet.paste(image, (n * width, 0))
    return sheet


def write(files: Sequence[tuple[Path, bytes]]) -> None:
    """Write all beside their places, then rename: each file is whole, or as it was before."""
    places = {path.resolve(): partial(_put, content) for path, content in files}  # links stay links
    try:
        atomic_write_all(places, part=f".{os.getpid()}.part")
    except OSError as error:
        named = " and ".join(repr(str(path)) for path, _ in files)
        raise ValueError(
            f"cannot write {named} ({sentence(error)}); free some space or choose another place"
        ) from None


def _put(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def sentence(error: BaseException) -> str:
    """Return an error as one line, without the number that the operating system gives it."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror.lower()
        return f"{text}: {error.filename!r}" if error.filename else text
    return " ".join(str(error).split())
