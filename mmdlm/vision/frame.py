"""An image on the canvas of an image tokenizer, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from mmdlm.vision.image_files import WHITE


@dataclass(frozen=True)
class Frame:
    """Where an image of `size` lies, scaled as a whole, on a white canvas of `canvas` pixels."""

    canvas: tuple[int, int]  # height, width
    size: tuple[int, int]  # width, height
    left: int
    top: int
    width: int
    height: int

    @classmethod
    def within(cls, canvas: tuple[int, int], size: tuple[int, int]) -> Frame:
        """As large as it fits, in the middle."""
        (rows, columns), (width, height) = canvas, size
        if width * rows >= height * columns:  # it touches left and right
            scaled = columns, max(1, round(height * columns / width))
        else:
            scaled = max(1, round(width * rows / height)), rows
        return cls(canvas, size, (columns - scaled[0]) // 2, (rows - scaled[1]) // 2, *scaled)

    def place(self, image: Image.Image) -> Image.Image:
        """Put the image on the canvas."""
        canvas = Image.new("RGB", self.canvas[::-1], WHITE)
        scaled = image.resize((self.width, self.height), Image.Resampling.BICUBIC)
        canvas.paste(scaled, (self.left, self.top))
        return canvas

    def take(self, canvas: Image.Image) -> Image.Image:
        """Cut the image out of the canvas, in its own size."""
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        return canvas.crop(box).resize(self.size, Image.Resampling.BICUBIC)

    def cells(self, hole: Tensor, cell: int) -> Tensor:
        """Pixels of the image [H, W] -> cells of the canvas, True where any pixel touches one."""
        rows = _touches(hole.shape[0], self.height, self.top, cell, self.canvas[0] // cell)
        columns = _touches(hole.shape[1], self.width, self.left, cell, self.canvas[1] // cell)
        return (rows @ hole.float() @ columns.T) > 0


def _touches(pixels: int, scaled: int, offset: int, cell: int, cells: int) -> Tensor:
    """[cells, pixels] float: 1 where a pixel of a scaled and shifted row overlaps a cell.

    In whole numbers, in units of 1 / pixels of a pixel of the canvas.
    """
    start = offset * pixels + torch.arange(pixels) * scaled
    edge = torch.arange(cells)[:, None] * cell * pixels
    return ((start < edge + cell * pixels) & (start + scaled > edge)).float()
