"""Images and tensors of pixels: nothing lost, and clear words for what has another shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmdlm.vision.pixels import to_image, to_pixels

RED, WHITE = (255, 0, 0), (255, 255, 255)


def every_level() -> Image.Image:
    """16x16 RGB image that holds each of the 256 levels in each channel."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return Image.fromarray(np.stack([levels, levels.T, levels[::-1]], axis=-1))


def two_halves(width: int, height: int) -> Image.Image:
    """Left half red, right half white."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height))
    return image


def test_round_trip_keeps_every_level() -> None:
    image = every_level()
    pixels = to_pixels(image)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert to_image(pixels).tobytes() == image.tobytes()


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_image_of_the_right_size_is_untouched(fit) -> None:
    image = every_level()
    assert torch.equal(to_pixels(image, 16, fit=fit), to_pixels(image))


def test_values_outside_the_range_are_clamped() -> None:
    pixels = torch.tensor([-3.0, 0.0, 3.0])[:, None, None]
    assert to_image(pixels).getpixel((0, 0)) == (0, 128, 255)


def test_to_image_reads_half_precision_with_gradient() -> None:
    pixels = torch.zeros(3, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    assert to_image(pixels).size == (4, 2)


def test_to_image_refuses_a_batch() -> None:
    with pytest.raises(ValueError, match=r"\[3, H, W\], not \[1, 3, 4, 4\]"):
        to_image(torch.zeros(1, 3, 4, 4))


def test_crop_keeps_the_middle_of_the_long_side() -> None:
    image = Image.new("RGB", (30, 10), WHITE)
    image.paste(RED, (10, 0, 20, 10))
    assert to_image(to_pixels(image, 10)).getcolors() == [(100, RED)]


def test_pad_keeps_everything_on_white() -> None:
    image = to_image(to_pixels(Image.new("RGB", (30, 10), RED), 30, fit="pad"))
    assert sorted(image.getcolors()) == [(300, RED), (600, WHITE)]
    assert image.getpixel((0, 15)) == RED
    assert image.getpixel((0, 0)) == WHITE


def test_stretch_ignores_the_aspect_ratio() -> None:
    pixels = to_pixels(two_halves(40, 10), 20, fit="stretch")
    assert pixels.shape == (3, 20, 20)
    assert to_image(pixels).getpixel((0, 19)) == RED
    assert to_image(pixels).getpixel((19, 0)) == WHITE


def test_size_is_height_then_width() -> None:
    assert to_pixels(two_halves(40, 10), (8, 24)).shape == (3, 8, 24)


def test_wrong_sizes_and_fits_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 1 ... 16384, not 0x0"):
        to_pixels(every_level(), 0)
    with pytest.raises(ValueError, match="'crop', 'pad' or 'stretch', not 'squash'"):
        to_pixels(every_level(), 8, fit="squash")


def test_arguments_are_left_alone(tmp_path) -> None:
    image = Image.new("RGBA", (4, 4), (*RED, 128))
    before = image.tobytes()
    to_pixels(image, 2)
    assert (image.mode, image.size, image.tobytes()) == ("RGBA", (4, 4), before)
