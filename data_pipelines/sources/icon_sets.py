"""Draw the emoji of an Iconify icon set, such as Twemoji or Fluent Emoji Flat, from its SVG."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.sources.emoji_facts import plain_key
from mmdlm.vision.image_files import open_image

OVERSAMPLING = 4  # icons are rendered so many times as large, then scaled down: edges stay smooth
# Style, as prompts say it -> npm package of its icons. All three styles are free to share alike
# without conditions on the model: SIL Open Font License (Noto), CC BY 4.0, MIT.
PACKAGES = {"twemoji": "@iconify-json/twemoji", "fluent": "@iconify-json/fluent-emoji-flat"}


@dataclass(frozen=True)
class IconSet:
    """The icons of one style.

    Attributes:
        style: Name of the style, as prompts say it.
        keys: Code points in hexadecimal, joined by "-", without variation selectors -> icon name.
        icons: Icon name -> SVG body and, where it has its own, left, top, width and height.
        box: Left, top, width and height of the other icons.
        license: SPDX name.
        author: Who drew them.
        version: Of the package.
    """

    style: str
    keys: dict[str, str]
    icons: dict[str, dict[str, Any]]
    box: tuple[float, float, float, float]
    license: str
    author: str
    version: str

    @classmethod
    def read(cls, style: str, folder: Path) -> IconSet:
        """Read the package of a style; ValueError where a file is missing or no icon set."""
        try:
            keys, icons, info, package = (
                json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
                for name in ("chars", "icons", "info", "package")
            )
            box = tuple(icons.get(n, d) for n, d in zip(BOX, (0, 0, 16, 16), strict=True))
            return cls(
                style=style,
                keys=dict(keys),
                icons=dict(icons["icons"]),
                box=box,
                license=info["license"]["spdx"],
                author=info["author"]["name"],
                version=package["version"],
            )
        except FileNotFoundError as error:
            raise ValueError(
                f"icons of {style}: {error.filename} is missing; install the package with "
                f"npm install {PACKAGES.get(style, folder.name)}"
            ) from None
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(
                f"icons of {style}: {folder} is no Iconify icon set ({error}); install "
                f"{PACKAGES.get(style, 'it')} again"
            ) from None

    def draw(self, characters: str, *, size: int) -> Image.Image | None:
        """Return the icon of an emoji, RGB on white, `size` pixels square; None: not in the set."""
        icon = self.icons.get(self.keys.get(plain_key(characters), ""))
        if icon is None:
            return None
        left, top, width, height = (icon.get(n, d) for n, d in zip(BOX, self.box, strict=True))
        side = max(width, height)  # a flag that is wider than high keeps its shape
        left, top = left - (side - width) / 2, top - (side - height) / 2
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {side} {side}" width="{size}" height="{size}">'
            f"{icon['body']}</svg>"
        )
        large = open_image(_render(svg, size * OVERSAMPLING))
        return large.resize((size, size), Image.Resampling.LANCZOS)


BOX = ("left", "top", "width", "height")


def read_icon_sets(folder: Path) -> list[IconSet]:
    """Read all styles of `PACKAGES` from the folder in which npm has installed them."""
    root = folder if folder.name == "node_modules" else folder / "node_modules"
    return [IconSet.read(style, root / package) for style, package in PACKAGES.items()]


def _render(svg: str, side: int) -> bytes:
    """SVG -> PNG on white."""
    try:
        import resvg_py
    except ImportError:
        raise ValueError(
            "drawing icon sets needs resvg-py, which is not installed; "
            "pip install 'mmdlm[train]' brings it"
        ) from None
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg, width=side, height=side, background="#ffffff", skip_system_fonts=True
        )
    )
