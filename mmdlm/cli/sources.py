"""Read what a command is asked about: texts and images from arguments, pipes, files and folders."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmdlm.cli.image_files import IMAGE_FORMATS
from mmdlm.templates.infill import check_whole

if TYPE_CHECKING:
    from PIL import Image

URL = re.compile(r"https?://", re.IGNORECASE)


def texts_of(given: Sequence[str], *, by_line: bool = True) -> list[str]:
    """Return the texts that arguments stand for, in their order.

    Args:
        given: Texts; `-` for standard input, `@FILE` for a file. A blank before an `@` makes it a
            letter.
        by_line: Whether each line of an input or a file is a text; otherwise all of it is one.

    Returns:
        At least one text; each has a word in it.

    Raises:
        ValueError: For an empty text, a file that cannot be read, and what is not UTF-8.
    """
    found: list[str] = []
    for one in given:
        if one == "-":
            found += _split(sys.stdin.read(), "standard input", by_line=by_line)
        elif re.fullmatch(r"@\S+", one):
            found += _split(_read(one), f"the file {one[1:]!r}", by_line=by_line)
        else:
            if not one.strip():
                raise ValueError("a text is empty; give at least one word")
            check_whole(one)
            found.append(one)
    return found


@dataclass(frozen=True)
class ImageSource:
    """Where an image comes from.

    Attributes:
        name: Its path or URL.
        is_named: Whether it was named by itself; otherwise it was found in a folder or a list.
    """

    name: str
    is_named: bool

    def open(self, max_pixels: int | None) -> Image.Image:
        """Read or fetch it; ValueError names one that cannot be read or is too small to be seen."""
        from mmdlm.vision.image_urls import load_image
        from mmdlm.vision.pixels import check_visible

        image = load_image(self.name, max_pixels=max_pixels)
        try:
            check_visible(*image.size)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        return image

    @property
    def is_url(self) -> bool:
        """Whether it is fetched."""
        return URL.match(self.name) is not None


def images_of(given: Sequence[str]) -> list[ImageSource]:
    """Return the images that arguments stand for.

    Args:
        given: Files, http(s) URLs, folders for all image files in and below them, `-` for a list of
            files and URLs on standard input, `@FILE` for one in a file.

    Returns:
        At least one image, in order; those of a folder are sorted by name.

    Raises:
        ValueError: For a list that cannot be read, and a folder without images.
    """
    found: list[ImageSource] = []
    for one in given:
        if one == "-" or re.fullmatch(r"@\S+", one):
            listed = sys.stdin.read() if one == "-" else _read(one)
            names = _split(listed, "the list of images", by_line=True)
            found += [ImageSource(name.strip(), is_named=False) for name in names]
        elif not URL.match(one) and Path(one).is_dir():
            inside = list(_image_files(Path(one)))
            if not inside:
                raise ValueError(
                    f"the folder {one!r} has no image files; they end in {' '.join(IMAGE_FORMATS)}"
                )
            found += [ImageSource(str(path), is_named=False) for path in inside]
        else:
            found.append(ImageSource(one, is_named=True))
    return found


def _image_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_FORMATS and not is_hidden and path.is_file():
            yield path


def _read(argument: str) -> str:
    """Return the content of the file of an `@FILE`."""
    path = Path(argument[1:]).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is no text in UTF-8 (at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(
            f"{argument!r} stands for the file {str(path)!r}, which cannot be read ({reason}); "
            f"check the path, or write ' {argument}' for the letters"
        ) from error


def _split(content: str, what: str, *, by_line: bool) -> list[str]:
    """Return the lines of a content that are not blank, or all of it as one text."""
    check_whole(content)
    content = content.removeprefix("\ufeff")
    lines = content.splitlines() if by_line else [content.removesuffix("\n")]
    found = [line for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{what} has no text in it; write at least one word")
    return found
