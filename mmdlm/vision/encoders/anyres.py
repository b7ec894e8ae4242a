"""An overview of the image and tiles of it, as LLaVA-NeXT and LLaVA-OneVision cut it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from mmdlm.vision.encoders.crops import FeatureLayout
from mmdlm.vision.encoders.square import Square
from mmdlm.vision.encoders.tiling import Tiling, check_color, check_sides, covered_features
from mmdlm.vision.pixels import check_size


@dataclass(frozen=True, kw_only=True)
class Anyres(Tiling):
    """The whole image squashed into one crop, then the image again over a mosaic of tiles.

    Of the shapes that the mosaic may have, the one is taken that keeps most of the image's
    pixels, then the one that wastes fewest of its own, then the first. The image is resized into
    it and padded with black; features that show only padding are dropped.

    Attributes:
        size: Pixels of a tile's side.
        grid: Patches of a tile's side.
        shapes: (columns, rows) that the mosaic may have, in order of preference.
        max_tiles: A mosaic of more features than this many tiles have (by 1.1 a side) is shrunk to
            as many; None: never.
        tile_several: Tile each image of a conversation that has several, too; otherwise each of
            them is padded to a square of `background`, and is one crop.

    Source: arXiv:2408.03326, section 3.2 (max_tiles); LLaVA-NeXT's published code, which LLaDA-V
    and LaViDa run, for the arithmetic. Where an image covers not one whole row or column of
    features, that code keeps a row of padding or none; here it is an error.
    """

    kind: ClassVar[str] = "anyres"

    size: int
    grid: int
    shapes: tuple[tuple[int, int], ...]
    max_tiles: int | None = None
    tile_several: bool = False
    background: tuple[int, int, int] = (127, 127, 127)
    newline: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sides(size=self.size, grid=self.grid)
        object.__setattr__(self, "background", check_color(self.background))
        try:
            shapes = tuple((int(columns), int(rows)) for columns, rows in self.shapes)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"shapes must be pairs of (columns, rows), not {self.shapes!r}"
            ) from error
        if not shapes or min(min(shape) for shape in shapes) < 1:
            raise ValueError(f"shapes must be pairs of whole numbers from 1, not {self.shapes!r}")
        object.__setattr__(self, "shapes", shapes)
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ValueError(f"max_tiles must be at least 1, or None, not {self.max_tiles}")

    @staticmethod
    def shapes_of(
        pinpoints: str | Sequence[Sequence[int]], *, size: int
    ) -> tuple[tuple[int, int], ...]:
        """LLaVA's `image_grid_pinpoints` -> shapes, in its order.

        Its config has the first and last shape as text, "(1x1),...,(6x6)", or all sizes in pixels,
        [[384, 384], [384, 768]]. Raises ValueError for anything else, and for sizes that are no
        whole tiles.
        """
        given = pinpoints
        if isinstance(pinpoints, str):
            pairs = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
            if pairs:
                (first, low), (last, high) = pairs[0], pairs[-1]
                return tuple(
                    (columns, rows)
                    for columns in range(first, last + 1)
                    for rows in range(low, high + 1)
                )
            numbers = [int(number) for number in re.findall(r"\d+", pinpoints)]
            pinpoints = list(zip(numbers[::2], numbers[1::2], strict=False))
        if not pinpoints or any(side % size for pair in pinpoints for side in pair):
            raise ValueError(
                f"image_grid_pinpoints {given!r} are no multiples of tiles of {size}x{size}"
            )
        return tuple((width // size, height // size) for width, height in pinpoints)

    def layout(self, width: int, height: int, *, alone: bool = True) -> FeatureLayout:
        """See `Tiling.layout`; refuses images that cover no whole row or column of features."""
        if not alone and not self.tile_several:
            return self._square.layout(width, height)
        check_size(width, height)
        columns, rows = self._shape(width, height)
        pooled = self._pooled(self.grid, self.grid)
        mosaic = (rows * pooled[0], columns * pooled[1])
        window = _window(width, height, *mosaic)
        return FeatureLayout(
            (self.grid, self.grid),
            pooled,
            tiles=(rows, columns),
            window=window,
            shrunk=self._shrunk(window, pooled[0]),
            newline=self.newline,
        )

    def cut(self, image: Image.Image, layout: FeatureLayout) -> list[Image.Image]:
        """See `Tiling.cut`."""
        if layout.tiles is None:
            return self._square.cut(image, layout)
        rows, columns = layout.tiles
        canvas = self._letterboxed(image, columns * self.size, rows * self.size)
        tiles = [
            canvas.crop((x, y, x + self.size, y + self.size))
            for y in range(0, canvas.height, self.size)
            for x in range(0, canvas.width, self.size)
        ]
        return [self._resize(image, self.size, self.size), *tiles]

    @property
    def _square(self) -> Square:
        """What becomes of an image among several."""
        return Square(
            size=self.size,
            grid=self.grid,
            background=self.background,
            pooling=self.pooling,
            newline=self.newline,
            resampling=self.resampling,
        )

    def _shape(self, width: int, height: int) -> tuple[int, int]:
        """Return the best (columns, rows) for an image."""

        def merit(shape: tuple[int, int]) -> tuple[int, int]:
            canvas_width, canvas_height = shape[0] * self.size, shape[1] * self.size
            scale = min(canvas_width / width, canvas_height / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - canvas_width * canvas_height

        return max(self.shapes, key=merit)  # the first of equals

    def _letterboxed(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Return the image as large as fits, in the middle of a black canvas."""
        scale_x, scale_y = width / image.width, height / image.height
        if scale_x < scale_y:
            size = (width, min(math.ceil(image.height * scale_x), height))
        else:
            size = (min(math.ceil(image.width * scale_y), width), height)
        canvas = Image.new("RGB", (width, height))
        corner = ((width - size[0]) // 2, (height - size[1]) // 2)
        canvas.paste(self._resize(image, *size), corner)
        return canvas

    def _shrunk(self, window: tuple[int, int, int, int], side: int) -> tuple[int, int] | None:
        """Return the mosaic's size if it has more features than `max_tiles` tiles, else None."""
        if self.max_tiles is None:
            return None
        top, bottom, left, right = window
        rows, columns = bottom - top, right - left
        times = math.sqrt(rows * columns / (self.max_tiles * side**2))
        if times <= 1.1:
            return None
        # a thin mosaic shrinks to one row at least
        return max(1, int(rows // times)), max(1, int(columns // times))


def _window(width: int, height: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the features that show an image and not its padding.

    Padding is the same on both sides, so that a row or column more than is covered may stay.
    """
    covered = covered_features(width, height, rows, columns)
    if min(covered) < 1:
        raise ValueError(
            f"an image of {width}x{height} pixels is too narrow: of the {columns}x{rows} features "
            f"of its tiles it covers {covered[1]}x{covered[0]}; crop it or cut it into parts"
        )
    top, left = (rows - covered[0]) // 2, (columns - covered[1]) // 2
    return top, rows - top, left, columns - left
