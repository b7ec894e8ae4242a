"""What stands for codes that are still masked: tiles with a gap between them."""

from __future__ import annotations

from PIL import Image, ImageDraw

TILE, GAP = (216, 213, 208), (236, 234, 230)


def tiled(image: Image.Image, still_open: list[bool], cell: int) -> Image.Image:
    """Draw a tile over each cell of an image that is still masked (raster order)."""
    pen = ImageDraw.Draw(image)
    columns, gap = image.width // cell, max(1, cell // 8)
    for k in (k for k, covered in enumerate(still_open) if covered):
        x, y = k % columns * cell, k // columns * cell
        pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=GAP)
        if cell > 2 * gap:
            pen.rectangle((x + gap, y + gap, x + cell - 1 - gap, y + cell - 1 - gap), fill=TILE)
    return image
