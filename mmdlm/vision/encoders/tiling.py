"""From images to the crops that a vision tower looks at, and the slots that they will fill.

No model is needed here: data workers cut images, and count their slots, on their own.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdlm.vision.encoders.crops import CropViews, FeatureLayout
from mmdlm.vision.encoders.pooling import Pooling
from mmdlm.vision.image_files import to_rgb
from mmdlm.vision.pixels import check_size, check_visible

RESAMPLING = ("nearest", "bilinear", "bicubic", "lanczos")
_BAND = 256  # rows of a padded square that are in memory at a time


@dataclass(frozen=True, kw_only=True)
class Tiling(ABC):
    """How images become crops.

    pooling     what the adapter does to the features of each crop
    newline     see `FeatureLayout`
    resampling  the filter that resizes images, always with antialiasing
    """

    kind: ClassVar[str]

    pooling: Pooling | None = None
    newline: bool = False
    resampling: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"

    def __post_init__(self) -> None:
        pooling: Any = self.pooling
        if isinstance(pooling, Mapping):
            object.__setattr__(self, "pooling", _build(Pooling, pooling, "pooling"))
        if self.resampling not in RESAMPLING:
            raise ValueError(
                f"resampling must be one of {', '.join(RESAMPLING)}, not {self.resampling!r}"
            )

    @abstractmethod
    def layout(self, width: int, height: int, *, alone: bool = True) -> FeatureLayout:
        """The layout of an image of that many pixels; `alone`: the only one of its conversation.

        Raises ValueError for an image too small or too narrow to be seen.
        """

    @abstractmethod
    def cut(self, image: Image.Image, layout: FeatureLayout) -> list[Image.Image]:
        """The crops of an RGB image, in the order of the layout."""

    def views(self, images: Sequence[Image.Image]) -> list[CropViews]:
        """The views of the images of one conversation, in order.

        Transparency is laid on white, and a turned photograph is set upright, before anything.
        Raises ValueError for an image too small or too narrow to be seen.
        """
        views = []
        for image in images:
            image = to_rgb(image)
            layout = self.layout(*image.size, alone=len(images) == 1)
            crops = [_levels(crop) for crop in self.cut(image, layout)]
            views.append(CropViews(torch.stack(crops), layout))
        return views

    def to_dict(self) -> dict[str, Any]:
        """The kind and the fields as JSON can hold them."""
        return {"kind": self.kind, **_as_json(asdict(self))}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Tiling:
        """Read back `to_dict`; ValueError for an unknown kind or field."""
        options = dict(content)
        kinds = {tiling.kind: tiling for tiling in (Square, Anyres, Natural, Rounded)}
        kind = options.pop("kind", None)
        if kind not in kinds:
            raise ValueError(f"tiling kind must be one of {', '.join(kinds)}, not {kind!r}")
        return _build(kinds[kind], options, f"tiling {kind!r}")

    def _pooled(self, rows: int, columns: int) -> tuple[int, int]:
        return (rows, columns) if self.pooling is None else self.pooling.grid(rows, columns)

    def _resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        return image.resize((width, height), Image.Resampling[self.resampling.upper()])


@dataclass(frozen=True, kw_only=True)
class Square(Tiling):
    """One square crop an image: squashed into it, or padded to it.

    size        pixels of its side
    grid        patches of its side
    background  (R, G, B) that pads an image to a square; None: the image is squashed
    """

    kind: ClassVar[str] = "square"

    size: int
    grid: int
    background: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sides(size=self.size, grid=self.grid)
        if self.background is not None:
            object.__setattr__(self, "background", _color(self.background))

    def layout(self, width: int, height: int, *, alone: bool = True) -> FeatureLayout:
        """See `Tiling.layout`; refuses images that, unsquashed, are thinner than one feature."""
        check_size(width, height)
        pooled = self._pooled(self.grid, self.grid)
        rows, columns = _covered(width, height, *pooled)
        if min(rows, columns) < 1:
            raise ValueError(
                f"an image of {width}x{height} pixels is too narrow for a square of "
                f"{pooled[1]}x{pooled[0]} features, of which it covers {columns}x{rows}; "
                "crop it or cut it into parts"
            )
        return FeatureLayout((self.grid, self.grid), pooled, newline=self.newline)

    def cut(self, image: Image.Image, layout: FeatureLayout) -> list[Image.Image]:
        """See `Tiling.cut`."""
        if self.background is None:
            return [self._resize(image, self.size, self.size)]
        return [self._padded(image, self.background)]

    def _padded(self, image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
        """The image in the middle of a square, resized to `size`.

        The square is resized in bands, which changes no level (Pillow resizes all rows before all
        columns): a thin strip of an image would make a square of many gigabytes.
        """
        side = max(image.size)
        left, top = ((side - length) // 2 for length in image.size)
        narrow = Image.new("RGB", (self.size, side))
        for start in range(0, side, _BAND):
            band = Image.new("RGB", (side, min(_BAND, side - start)), background)
            band.paste(image, (left, top - start))
            narrow.paste(self._resize(band, self.size, band.height), (0, start))
        return self._resize(narrow, self.size, self.size)


@dataclass(frozen=True, kw_only=True)
class Anyres(Tiling):
    """The whole image squashed into one crop, then the image again over a mosaic of tiles.

    Of the shapes that the mosaic may have, the one is taken that keeps most of the image's
    pixels, then the one that wastes fewest of its own, then the first. The image is resized into
    it and padded with black; features that show padding alone are dropped.

    size          pixels of a tile's side
    grid          patches of a tile's side
    shapes        (columns, rows) that the mosaic may have, in order of preference
    max_tiles     a mosaic of more features than this many tiles have (by 1.1 a side) is shrunk to
                  as many; None: never
    tile_several  tile each image of a conversation that has several, too; otherwise each of them
                  is padded to a square of `background`, and is one crop

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
        _check_sides(size=self.size, grid=self.grid)
        object.__setattr__(self, "background", _color(self.background))
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
        """The best (columns, rows) for an image."""

        def merit(shape: tuple[int, int]) -> tuple[int, int]:
            canvas_width, canvas_height = shape[0] * self.size, shape[1] * self.size
            scale = min(canvas_width / width, canvas_height / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - canvas_width * canvas_height

        return max(self.shapes, key=merit)  # the first of equals

    def _letterboxed(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """The image as large as fits, in the middle of a black canvas."""
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
        """The size of the mosaic where it has more features than `max_tiles` tiles, else None."""
        if self.max_tiles is None:
            return None
        top, bottom, left, right = window
        rows, columns = bottom - top, right - left
        times = math.sqrt(rows * columns / (self.max_tiles * side**2))
        if times <= 1.1:
            return None
        # a thin mosaic shrinks to one row at least
        return max(1, int(rows // times)), max(1, int(columns // times))


@dataclass(frozen=True, kw_only=True)
class Natural(Tiling):
    """One crop an image, in its own aspect ratio, of as many patches as `max_patches` allows.

    Each side is rounded up to whole patches, and the image stretched to them.

    patch  pixels of a patch's side

    Source: arXiv:2502.14786, section 2.4 (NaFlex); the scale is found by the bisection of the
    published processor, from 1e-6 to 100, so that sizes agree at the edges too.
    """

    kind: ClassVar[str] = "natural"

    patch: int
    max_patches: int = 256
    resampling: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sides(patch=self.patch, max_patches=self.max_patches)

    def layout(self, width: int, height: int, *, alone: bool = True) -> FeatureLayout:
        """See `Tiling.layout`; refuses images that are longer than `max_patches` squares."""
        check_size(width, height)
        if max(width, height) > self.max_patches * min(width, height):
            raise ValueError(
                f"an image of {width}x{height} pixels is too narrow for {self.max_patches} "
                f"patches: its sides may differ {self.max_patches} times; crop it or cut it into "
                "parts"
            )
        low, high = 1e-6, 100.0
        while high - low >= 1e-5:
            scale = (low + high) / 2
            rows, columns = self._patches(width, height, scale)
            low, high = (scale, high) if rows * columns <= self.max_patches else (low, scale)
        grid = self._patches(width, height, low)
        return FeatureLayout(grid, self._pooled(*grid), newline=self.newline)

    def cut(self, image: Image.Image, layout: FeatureLayout) -> list[Image.Image]:
        """See `Tiling.cut`."""
        rows, columns = layout.patches
        return [self._resize(image, columns * self.patch, rows * self.patch)]

    def _patches(self, width: int, height: int, scale: float) -> tuple[int, int]:
        rows, columns = (math.ceil(side * scale / self.patch) for side in (height, width))
        return max(1, rows), max(1, columns)


@dataclass(frozen=True, kw_only=True)
class Rounded(Tiling):
    """One crop an image, nearly in its own aspect ratio and size, and on axes
    (`FeatureLayout.axes`).

    Each side is rounded to whole patches. An image of too many or too few pixels is scaled first,
    and its sides then rounded towards what is allowed.

    patch       pixels of a patch's side
    min_pixels  that a crop has at least
    max_pixels  that a crop has at most

    Source: arXiv:2409.12191, section 2.1; the arithmetic of the published processor, in which a
    side of less than half a patch is none at all: here it is one patch.
    """

    kind: ClassVar[str] = "rounded"

    patch: int
    min_pixels: int = 56 * 56
    max_pixels: int = 1280 * 28 * 28

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sides(patch=self.patch, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        if self.max_pixels < max(self.min_pixels, self.patch**2):
            raise ValueError(
                f"tiling: max_pixels {self.max_pixels} is less than min_pixels {self.min_pixels}, "
                f"or than one patch of {self.patch}x{self.patch}; raise it"
            )
        if self.newline:
            raise ValueError("tiling 'rounded' has rows among the positions, and no newline")

    def layout(self, width: int, height: int, *, alone: bool = True) -> FeatureLayout:
        """See `Tiling.layout`; refuses images of sides that differ more than 200 times."""
        check_visible(width, height)
        # Python rounds halves to even numbers, as the published processor does.
        grid = [round(side / self.patch) for side in (height, width)]
        if grid[0] * grid[1] * self.patch**2 > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            grid = [math.floor(side / scale / self.patch) for side in (height, width)]
        elif grid[0] * grid[1] * self.patch**2 < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            grid = [math.ceil(side * scale / self.patch) for side in (height, width)]
        rows, columns = (max(1, count) for count in grid)
        return FeatureLayout((rows, columns), self._pooled(rows, columns), axes=True)

    def cut(self, image: Image.Image, layout: FeatureLayout) -> list[Image.Image]:
        """See `Tiling.cut`."""
        rows, columns = layout.patches
        return [self._resize(image, columns * self.patch, rows * self.patch)]


def _levels(image: Image.Image) -> Tensor:
    """RGB image -> [3, H, W] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _covered(width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """Whole (rows, columns) of features that an image covers, as large as it fits into them."""
    if width / height > columns / rows:
        return int(height * (columns / width)), columns
    return rows, int(width * (rows / height))


def _window(width: int, height: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the features that show an image and not its padding.

    Padding is the same on both sides, so that a row or column more than is covered may stay.
    """
    covered = _covered(width, height, rows, columns)
    if min(covered) < 1:
        raise ValueError(
            f"an image of {width}x{height} pixels is too narrow: of the {columns}x{rows} features "
            f"of its tiles it covers {covered[1]}x{covered[0]}; crop it or cut it into parts"
        )
    top, left = (rows - covered[0]) // 2, (columns - covered[1]) // 2
    return top, rows - top, left, columns - left


def _check_sides(**sides: int) -> None:
    for name, value in sides.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"tiling: {name} must be a whole number from 1, not {value!r}")


def _color(value: Sequence[int]) -> tuple[int, int, int]:
    if len(value) != 3 or any(type(level) is not int or not 0 <= level < 256 for level in value):
        raise ValueError(f"background must be three levels from 0 to 255, not {value!r}")
    red, green, blue = value
    return red, green, blue


def _build(kind: type, options: Mapping[str, Any], what: str) -> Any:
    """A dataclass from its JSON fields; ValueError names those that it does not have, or lacks."""
    known = [field.name for field in fields(kind)]
    for name in options:
        if name not in known:
            raise ValueError(f"{what} has no {name!r}; it takes {', '.join(known)}")
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error


def _as_json(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_as_json(part) for part in value]
    return value
