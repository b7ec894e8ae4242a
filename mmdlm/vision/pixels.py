"""Between images and tensors of pixels in [-1, 1].

How an image meets the square that a tokenizer was trained on is the `fit` of `to_pixels`:
"crop" scales the short side to the size and cuts the long side evenly (MMaDA, Show-o and most
tokenizers were trained so), "pad" scales the long side and fills the rest with white (nothing is
lost; for images on white, such as emoji), "stretch" ignores the aspect ratio. An image that
already has the size passes through unchanged, to the last bit.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmdlm.vision.image_files import WHITE, to_rgb

Fit = Literal["crop", "pad", "stretch"]
# Bicubic resampling weighs four pixels a side; an image with fewer is all extrapolation. Web
# crawls are full of 1x1 trackers, while the thinnest lines of text stay above this.
MIN_SIDE = 4
MAX_RATIO = 200  # of the sides of an image; beyond that little of it is seen, or all of it blurred
MAX_EDGE = 1 << 14  # pixels along the side of an image that one is scaled to


def check_size(width: int, height: int) -> None:
    """Raise ValueError for an image that is too small to be seen."""
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"an image of {width}x{height} pixels is too small to be seen; each side needs "
            f"{MIN_SIDE} pixels at least"
        )


def check_visible(width: int, height: int) -> None:
    """Raise ValueError for an image that is too small or too narrow to be seen."""
    check_size(width, height)
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"an image of {width}x{height} pixels is too narrow: its sides may differ "
            f"{MAX_RATIO} times; crop it or cut it into parts"
        )


def to_pixels(
    image: Image.Image, size: int | tuple[int, int] | None = None, *, fit: Fit = "crop"
) -> Tensor:
    """Turn an image of any mode into [3, H, W] float32 pixels in [-1, 1].

    `size` is the edge of a square or (height, width); None keeps the image's own. Resampling is
    bicubic with antialiasing. Raises ValueError for a size below 1 or an unknown `fit`.
    """
    image = to_rgb(image)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = _resize(image, (width, height), fit)
    array = np.array(image, dtype=np.float32) / 127.5 - 1  # [H, W, 3]
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] pixels -> RGB image; values outside [-1, 1] are clamped.

    The inverse of `to_pixels` to the last bit. Raises ValueError for another shape, and for values
    that are not finite, of which nothing could be seen.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"pixels of one image have shape [3, H, W], not {list(pixels.shape)}")
    pixels = pixels.detach().cpu()
    check_finite(pixels)
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def check_finite(values: Tensor) -> None:
    """Raise ValueError where an image tokenizer gives what is no number, of which none is seen."""
    if not bool(values.isfinite().all()):
        raise ValueError(
            "the image tokenizer's numbers are not finite: it gives NaN or infinite ones; its "
            "weights are damaged, or overflow in this dtype: load it in another (bfloat16 or "
            "float32 in place of float16), or download or copy the checkpoint again"
        )


def _resize(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """RGB image -> RGB image of `size` (width, height)."""
    if not 1 <= min(size) <= max(size) <= MAX_EDGE:
        raise ValueError(f"an image size must be 1 ... {MAX_EDGE}, not {size[1]}x{size[0]}")
    resampling = Image.Resampling.BICUBIC
    match fit:
        case "crop":
            return ImageOps.fit(image, size, method=resampling)
        case "pad":
            return ImageOps.pad(image, size, method=resampling, color=WHITE)
        case "stretch":
            return image.resize(size, resampling)
    raise ValueError(f"fit must be 'crop', 'pad' or 'stretch', not {fit!r}")
