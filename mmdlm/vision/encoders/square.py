"""One square crop for each image: squashed into it, or padded to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from mmdlm.vision.encoders.crops import FeatureLayout
from mmdlm.vision.encoders.tiling import Tiling, check_color, check_sides, covered_features
from mmdlm.vision.pixels import check_size

_BAND = 256  # rows of a padded square that are in memory at a time


@dataclass(frozen=True, kw_only=True)
class Square(Tiling):
    """One square crop an image: squashed into it, or padded to it.

    Attributes:
        size: Pixels of its side.
        grid: Patches of its side.
        background: (R, G, B) that pads an image to a square; None: the image is squashed.
    """

    kind: ClassVar[str] = "square"

    size: int
    grid: int
    background: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sides(size=self.size, grid=self.grid)
        if self.background is not None:
            object.__setattr__(self, "background", check_color(self.background))

    def layout(self, width: int, height: int, *, alone: bool = True) -> FeatureLayout:
        """See `Tiling.layout`; refuses images that, unsquashed, are thinner than one feature."""
        check_size(width, height)
        pooled = self._pooled(self.grid, self.grid)
        rows, columns = covered_features(width, height, *pooled)
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
        """Pad the image to a square, in its middle, and resize it to `size`.

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
