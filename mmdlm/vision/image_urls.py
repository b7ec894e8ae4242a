"""Fetch images from URLs: only where a caller asks for it by name, never because a text has one."""

from __future__ import annotations

import base64
import binascii
import re
from http.client import HTTPException
from os import PathLike
from urllib.error import HTTPError, URLError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from PIL import Image

from mmdlm.vision.image_files import URL, open_image

DATA_URL = re.compile(r"data:[\w/+.-]*(?:;[\w=.+-]+)*;base64,(.*)", re.DOTALL | re.IGNORECASE)
SECONDS = 60  # to wait for a server that says nothing
MOST_BYTES = 1 << 28  # of a file
AGENT = "mmdlm (https://pypi.org/project/mmdlm)"  # some servers want to know who asks


def load_image(source: str | PathLike[str], *, max_pixels: int | None = None) -> Image.Image:
    """Read an image from a file, an http(s) URL or a data URL, as upright RGB.

    A URL is fetched because you call this function; the methods of a model fetch nothing.

    Args:
        source: Path or URL.
        max_pixels: As in `mmdlm.vision.image_files.open_image`.

    Returns:
        The image.

    Raises:
        ValueError: If it cannot be had, is too large, damaged, or of another format.
    """
    if not is_url(source):
        return open_image(source, max_pixels=max_pixels)
    url = str(source)
    data = data_of(url) if url.lower().startswith("data:") else fetch(url)
    try:
        return open_image(data, max_pixels=max_pixels)
    except ValueError as error:
        raise ValueError(f"{_shown(url)}: {error}") from error


def is_url(source: object) -> bool:
    """Whether a text is a URL and no path."""
    return isinstance(source, str) and URL.match(source) is not None


def data_of(url: str) -> bytes:
    """Return the bytes that a data URL holds; ValueError unless it is one in base64."""
    match = DATA_URL.fullmatch(url)
    try:
        if match is None:
            raise ValueError("it does not begin with data:image/png;base64, or the like")
        return base64.b64decode(re.sub(r"\s", "", match[1]), validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{_shown(url)} is no data URL of an image ({error})") from error


def fetch(url: str, *, max_bytes: int = MOST_BYTES) -> bytes:
    """Return what an http(s) URL gives.

    Args:
        url: Where it is.
        max_bytes: The most that is taken.

    Returns:
        The body of the answer.

    Raises:
        ValueError: For another kind of URL, an answer that is no success, and one that is too long.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise ValueError(f"{_shown(url)} is no http or https URL; give one, or a file")
    try:
        with _opener().open(Request(url, headers={"User-Agent": AGENT}), timeout=SECONDS) as reply:
            data: bytes = reply.read(max_bytes + 1)
    except HTTPError as error:
        raise ValueError(f"{_shown(url)}: the server says {error.code} {error.reason}") from error
    except (URLError, OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, OSError) and reason.strerror:
            reason = reason.strerror.lower()
        raise ValueError(f"{_shown(url)} cannot be fetched ({reason})") from error
    if len(data) > max_bytes:
        raise ValueError(f"{_shown(url)} has more than {max_bytes:,} bytes; download and shrink it")
    return data


def _opener() -> OpenerDirector:
    """Follow redirects to http and https only, not to files."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler,
        HTTPHandler,
        HTTPSHandler,
        HTTPRedirectHandler,
        HTTPDefaultErrorHandler,
        HTTPErrorProcessor,
        UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _shown(url: str) -> str:
    return repr(url if len(url) <= 80 else f"{url[:77]}...")
