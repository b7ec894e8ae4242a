"""Picture files and tensors of pixels: nothing lost, and clear words for what is no picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmdlm.vision.pixels import open_image, to_image, to_pixels, to_rgb

RED, WHITE = (255, 0, 0), (255, 255, 255)


def every_level() -> Image.Image:
    """16x16 RGB picture that holds each of the 256 levels in each channel."""
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
def test_a_picture_of_the_right_size_is_untouched(fit) -> None:
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
    with pytest.raises(ValueError, match="must be positive, not 0x0"):
        to_pixels(every_level(), 0)
    with pytest.raises(ValueError, match="'crop', 'pad' or 'stretch', not 'squash'"):
        to_pixels(every_level(), 8, fit="squash")


MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16B I;16L"


@pytest.mark.parametrize("mode", MODES.split())
def test_every_mode_becomes_rgb(mode) -> None:
    assert to_pixels(Image.new(mode, (5, 7)), (7, 5)).shape == (3, 7, 5)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.array([[0, 128 * 257, 65535]], dtype=np.uint16))
    assert [to_rgb(grey).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_transparency_shows_white(tmp_path) -> None:
    image = Image.new("RGBA", (3, 1), (*RED, 0))
    image.putpixel((1, 0), (*RED, 255))
    image.putpixel((2, 0), (*RED, 51))  # a fifth of red
    image.save(tmp_path / "a.png")
    seen = open_image(tmp_path / "a.png")
    assert [seen.getpixel((x, 0)) for x in range(3)] == [WHITE, RED, (255, 204, 204)]


def test_a_transparent_palette_colour_shows_white(tmp_path) -> None:
    image = two_halves(4, 1).quantize(2)
    red = image.getpixel((0, 0))
    image.save(tmp_path / "a.png", transparency=red)
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == WHITE


def test_exif_orientation_is_applied(tmp_path) -> None:
    image = two_halves(32, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    seen = open_image(tmp_path / "turned.jpg")
    assert seen.size == (16, 32)
    top, bottom = seen.getpixel((8, 2)), seen.getpixel((8, 29))
    assert top[1] < 60
    assert bottom[1] > 200


def test_arguments_are_left_alone(tmp_path) -> None:
    image = Image.new("RGBA", (4, 4), (*RED, 128))
    before = image.tobytes()
    to_pixels(image, 2)
    assert (image.mode, image.size, image.tobytes()) == ("RGBA", (4, 4), before)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no image file at '.*cat.png'; check the path"):
        open_image(tmp_path / "cat.png")


def test_folder_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"'{tmp_path}' is a folder"):
        open_image(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not a picture at all", b"\x89PNG\r\n\x1a\n" + b"0" * 40]
)
def test_what_is_no_picture_is_named(tmp_path, content) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read '.*cat.png' as an image"):
        open_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
def test_cut_off_file_is_named(tmp_path, suffix) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path: Path = tmp_path / f"cat.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cannot read '.*cat.{suffix}' as an image"):
        open_image(path)


def test_a_picture_that_would_fill_memory_is_refused(tmp_path, monkeypatch) -> None:
    every_level().save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"huge.png' is too large"):
        open_image(tmp_path / "huge.png")
