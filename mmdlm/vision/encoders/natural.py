"""One crop for each image in its own aspect ratio (NaFlex and Qwen2-VL)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from PIL import Image

from mmdlm.vision.encoders.crops import FeatureLayout
from mmdlm.vision.encoders.tiling import Tiling, check_sides
from mmdlm.vision.pixels import check_size, check_visible


@dataclass(frozen=True, kw_only=True)
class Natural(Tiling):
    """One crop an image, in its own aspect ratio, of as many patches as `max_patches` allows.

    Each side is rounded up to whole patches, and the image stretched to them.

    Attributes:
        patch: Pixels of a patch's side.

    Source: arXiv:2502.14786, section 2.4 (NaFlex); the scale is found by the bisection of the
    published processor, from 1e-6 to 100, so that sizes agree at the edges too.
    """

    kind: ClassVar[str] = "natural"

    patch: int
    max_patches: int = 256
    resampling: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sides(patch=self.patch, max_patches=self.max_patches)

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
    """One crop for each image, nearly in its own aspect ratio and size.

    Its features have positions on axes (`FeatureLayout.axes`).
    Each side is rounded to whole patches. An image of too many or too few pixels is scaled first,
    and its sides then rounded towards what is allowed.

    Attributes:
        patch: Pixels of a patch's side.
        min_pixels: That a crop has at least.
        max_pixels: That a crop has at most.

    Source: arXiv:2409.12191, section 2.1; the arithmetic of the published processor, in which a
    side of less than half a patch is none at all: here it is one patch.
    """

    kind: ClassVar[str] = "rounded"

    patch: int
    min_pixels: int = 56 * 56
    max_pixels: int = 1280 * 28 * 28

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sides(patch=self.patch, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
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
