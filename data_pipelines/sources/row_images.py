"""Images of rows: bytes, paths, base64, or URLs of which img2dataset has fetched the files."""

from __future__ import annotations

import base64
import binascii
import io
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.sources.local_files import MissingFile, file_inside, files_below
from data_pipelines.sources.source import IMAGES
from data_pipelines.sources.text_files import parsed
from mmdlm.templates.conversation import IMAGE
from mmdlm.templates.infill import shortened
from mmdlm.vision.image_files import image_format, open_image, to_rgb

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # what shards keep as it is
URLS = ("http://", "https://")
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
# Where a piece of a message, or a struct of `datasets`, may have its image.
KEYS = ("bytes", "image", "path", "image_url", "url", "base64")


@dataclass(frozen=True)
class Images:
    """Where a row has its images.

    Attributes:
        folder: That their paths begin in, or the output of img2dataset for their URLs.
        mark: Of an image in a text.
        allow_outside: Whether a path may lead out of the folder.
    """

    folder: Path | None = None
    mark: str = IMAGE
    allow_outside: bool = False

    def read(self, given: Any) -> tuple[bytes, str, bool]:
        """Return an image in any form as (file, extension, whether the file is another than given).

        What shards do not hold as it is, and what is decoded already, becomes PNG.

        Raises MissingFile: there is no such file. Raises ValueError: it is no image.
        """
        given = image_in(given)
        if isinstance(given, str):
            given = self._file(given)
        if isinstance(given, bytes):
            if extension := EXTENSIONS.get(image_format(given)):
                return given, extension, False
            given = open_image(given, whole=True)
        if not isinstance(given, Image.Image):
            raise ValueError(f"its image is neither file nor path but {type(given).__name__}")
        file = io.BytesIO()
        to_rgb(given).save(file, format="PNG")
        return file.getvalue(), "png", True

    def _file(self, name: str) -> bytes:
        if match := DATA_URL.match(name):
            try:
                return base64.b64decode(name[match.end() :], validate=True)
            except binascii.Error as error:
                raise ValueError(f"its image is no base64 ({error})") from None
        if name.startswith(URLS):
            return self._fetched(name)
        if name.startswith("data:"):
            raise ValueError(f"its image {shortened(name)!r} is no base64 of an image")
        path = file_inside(self.folder or Path(), name, allow_outside=self.allow_outside)
        return path.read_bytes()

    def _fetched(self, url: str) -> bytes:
        """Return the file of a URL that img2dataset has fetched into `folder`."""
        fetched = fetched_images(self.folder) if self.folder is not None else {}
        if url in fetched:
            return fetched[url].read()
        if fetched:
            raise MissingFile(f"its image {shortened(url)!r} was not fetched")
        raise MissingFile(
            f"its image {shortened(url)!r} is no file; fetch it with img2dataset and name the "
            "folder that it writes as images"
        )


def image_in(given: Any) -> Any:
    """Return the image in a struct of `datasets`, or in a piece of a message; None for none."""
    while isinstance(given, Mapping):
        key = next((key for key in KEYS if given.get(key)), None)
        given = None if key is None else given[key]
        if key == "base64" and isinstance(given, str) and not given.startswith("data:"):
            return f"data:image/any;base64,{given}"
    return given


@dataclass(frozen=True)
class Place:
    """A file, or a part of a tar."""

    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Return its content."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@lru_cache(maxsize=4)
def fetched_images(folder: Path) -> Mapping[str, Place]:
    """Return where each URL lies that img2dataset has fetched, from the metadata beside images.

    Its output formats "files" and "webdataset" are read; empty where a folder holds neither.
    """
    found: dict[str, Place] = {}
    for shard in files_below(folder, [".tar"]):
        found |= _in_tar(shard)
    for notes in files_below(folder, [".json"]):
        image = next(
            (one for end in IMAGES if (one := notes.with_suffix(f".{end}")).is_file()), None
        )
        if image is not None and (url := _url_of(notes.read_bytes())):
            found[url] = Place(image)
    return found


def _in_tar(shard: Path) -> dict[str, Place]:
    places: dict[str, Place] = {}
    urls: dict[str, str | None] = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.rpartition(".")
                if extension in IMAGES:
                    places[key] = Place(shard, member.offset_data, member.size)
                elif extension == "json":
                    notes = tar.extractfile(member)
                    urls[key] = _url_of(notes.read()) if notes else None
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is damaged ({error}); fetch it again") from error
    return {url: places[key] for key, url in urls.items() if url and key in places}


def _url_of(notes: bytes) -> str | None:
    try:
        content = parsed(notes)
    except ValueError:
        return None
    url = content.get("url") if isinstance(content, dict) else None
    return url if isinstance(url, str) else None
