"""Images from files and bytes: what is seen, what is refused, and that nothing else opens them."""

from __future__ import annotations

import ast
import io
import json
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from mmdlm.vision.image_files import LARGE, image_facts, image_format, open_image, open_mask, to_rgb

ROOT = Path(__file__).parents[2]
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def two_halves(width: int, height: int) -> Image.Image:
    """Left half red, right half white."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height))
    return image


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


# --- colors and orientation ----------------------------------------------------------------------


MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I;16 I;16B I;16L"


@pytest.mark.parametrize("mode", MODES.split())
def test_every_mode_becomes_rgb(mode) -> None:
    assert to_rgb(Image.new(mode, (5, 7))).mode == "RGB"


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    gray = Image.fromarray(np.array([[0, 128 * 257, 65535]], dtype=np.uint16))
    assert [to_rgb(gray).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_transparency_shows_white(tmp_path) -> None:
    image = Image.new("RGBA", (3, 1), (*RED, 0))
    image.putpixel((1, 0), (*RED, 255))
    image.putpixel((2, 0), (*RED, 51))  # a fifth of red
    image.save(tmp_path / "a.png")
    seen = open_image(tmp_path / "a.png")
    assert [seen.getpixel((x, 0)) for x in range(3)] == [WHITE, RED, (255, 204, 204)]


def test_a_transparent_palette_color_shows_white(tmp_path) -> None:
    image = two_halves(4, 1).quantize(2)
    red = image.getpixel((0, 0))
    image.save(tmp_path / "a.png", transparency=red)
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_range_are_refused(mode) -> None:
    image = Image.new(mode, (8, 8), 100)
    for call in (lambda: to_rgb(image), lambda: open_image(file_of(image, "TIFF"))):
        with pytest.raises(ValueError, match="of which none is known to be white; save it with 8"):
            call()


def test_gray_files_of_more_than_8_bits_keep_their_range() -> None:
    ramp = np.linspace(0, 40000, 64, dtype=np.uint16).reshape(8, 8)
    expected = np.rint(ramp / 257)
    for kind in ("PNG", "TIFF"):
        seen = open_image(file_of(Image.fromarray(ramp), kind))
        assert np.array_equal(np.asarray(seen)[..., 0], expected)
    inverted = file_of(Image.fromarray(ramp), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(np.asarray(open_image(inverted))[..., 0], np.rint((65535 - ramp) / 257))


def test_a_transparent_value_of_16_bits_shows_white() -> None:
    image = Image.fromarray(np.array([[0, 40000]], dtype=np.uint16))
    seen = open_image(file_of(image, "PNG", transparency=0))
    assert [seen.getpixel((x, 0))[0] for x in range(2)] == [255, round(40000 / 257)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_every_format_is_set_upright_once(kind) -> None:
    image, options = two_halves(32, 16), {"exif": orientation(6)}
    if kind == "MPO":  # two frames in one JPEG, as telephones write them
        options |= {"save_all": True, "append_images": [two_halves(32, 16)]}
    seen = open_image(file_of(image, kind, **options))
    assert seen.size == (16, 32)
    top, bottom = seen.getpixel((8, 2)), seen.getpixel((8, 29))
    assert top[1] < 60
    assert bottom[1] > 200
    assert to_rgb(seen).tobytes() == seen.tobytes()  # whoever reads it next does not turn it again


def test_damaged_exif_leaves_the_image_as_it_lies() -> None:
    whole = file_of(two_halves(32, 16), "JPEG", exif=orientation(6))
    start = whole.index(b"Exif\0\0") + 6
    broken = whole[:start] + b"\xff" * 12 + whole[start + 12 :]
    assert open_image(broken).size == (32, 16)


# --- metadata -------------------------------------------------------------------------------------


def with_chunk(
    png: bytes, kind: bytes, body: bytes, *, last: bool = False, times: int = 1
) -> bytes:
    """A PNG with one more chunk, or several, before its pixels or behind them."""
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    place = png.index(b"IEND" if last else b"IDAT") - 4
    return png[:place] + chunk * times + png[place:]


LONG = zlib.compress(b"a workflow " * 300_000)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "kind, body",
    [
        (b"zTXt", b"workflow\0\0" + LONG),
        (b"iTXt", b"workflow\0\1\0\0\0" + LONG),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
        (b"zTXt", b"Raw profile type exif\0\0" + LONG),
        (b"tEXt", b"workflow\0" + b"x" * (3 << 20)),
        (b"iCCP", b"icc\0\0" + LONG),
        (b"iCCP", b"icc\0\0no profile at all"),
        (b"zTXt", b"no end of its keyword"),
        (b"gAMA", b"x"),
    ],
)
def test_metadata_of_a_png_is_not_needed_to_see_it(kind, body, last) -> None:
    image = two_halves(8, 8)
    png = with_chunk(file_of(image, "PNG"), kind, body, last=last)
    assert open_image(png).tobytes() == image.tobytes()


def test_many_texts_are_left_out() -> None:
    text = b"workflow\0" + b"x" * ((1 << 20) - 9)
    png = with_chunk(file_of(two_halves(8, 8), "PNG"), b"tEXt", text, times=66)
    assert open_image(png).size == (8, 8)  # where Pillow reads 64 MiB of them


def test_texts_that_say_how_a_png_is_turned_are_read() -> None:
    png = file_of(two_halves(32, 16), "PNG")
    exif = orientation(6).tobytes()
    profile = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
    xmp = b'<x:xmpmeta tiff:Orientation="6"/>'
    for kind, body in (
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        (b"tEXt", b"Raw profile type exif\0" + profile),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    ):
        assert open_image(with_chunk(png, kind, body)).size == (16, 32)


# --- size -----------------------------------------------------------------------------------------


def plain_png(width: int, height: int, *, rows: int | None = None) -> bytes:
    """A black PNG with a white corner, small as a file; only `rows` of it are there."""
    squeeze = zlib.compressobj(1)
    white = min(width, 1000)
    row = b"\0" + b"\xff" * white + b"\0" * (width - white)
    dark = b"\0" + b"\0" * width
    there = height if rows is None else rows
    lines = [squeeze.compress(row if y < 1000 else dark) for y in range(there)]
    pixels = b"".join([*lines, squeeze.flush()])
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0),
        b"IDAT": pixels,
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks.items()
    )


@pytest.mark.slow
def test_a_very_large_image_comes_smaller_while_it_is_read() -> None:
    image = open_image(plain_png(13_000, 13_000))
    assert image.size == (6_500, 6_500)
    assert image.getpixel((499, 499)) == WHITE
    assert image.getpixel((500, 499)) == BLACK
    assert image.width * image.height <= LARGE


@pytest.mark.slow
def test_a_very_large_jpeg_is_scaled_while_it_is_decoded(monkeypatch) -> None:
    file = file_of(Image.new("L", (9_000, 9_000), 77), "JPEG", exif=orientation(6))
    decoded = []
    load = JpegImagePlugin.JpegImageFile.load

    def watched(image: JpegImagePlugin.JpegImageFile) -> Any:
        decoded.append(image.size)
        return load(image)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", watched)
    image = open_image(file)
    assert image.size == (4_500, 4_500)
    assert image.getpixel((9, 9)) == (77, 77, 77)
    assert set(decoded) == {(4_500, 4_500)}
    assert open_image(file, whole=True).size == (9_000, 9_000)


def test_the_most_pixels_are_an_option() -> None:
    image = file_of(two_halves(20, 10), "PNG")
    assert open_image(image, max_pixels=200).size == (20, 10)
    with pytest.raises(ValueError, match=r"too large: 20 x 10 pixels are more than 199, .* raise"):
        open_image(image, max_pixels=199)
    with pytest.raises(ValueError, match="15000 x 15000 pixels are more than 200,000,000"):
        open_image(plain_png(15_000, 15_000, rows=1))


# --- files that are refused -----------------------------------------------------------------------


def test_no_other_decoder_is_asked(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    two_halves(8, 8).save(tmp_path / "b.png", "PPM")
    for name in ("a.png", "b.png"):
        with pytest.raises(
            ValueError, match=f"{name}' .* it is none of PNG, JPEG, WebP, GIF, TIFF"
        ):
            open_image(tmp_path / name)


def test_a_wrong_ending_does_not_matter(tmp_path) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        (tmp_path / "cat.png").write_bytes(file_of(two_halves(8, 8), kind))
        assert open_image(tmp_path / "cat.png").size == (8, 8)
        assert image_format((tmp_path / "cat.png").read_bytes()) == kind


@pytest.mark.parametrize(
    "url", ["https://a.b/cat.png", "https:/a.b/cat.png", "data:image/png;base64,"]
)
def test_urls_are_refused(url) -> None:
    with pytest.raises(ValueError, match="is a URL; download it first"):
        open_image(url)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no image file at '.*cat.png'; check the path"):
        open_image(tmp_path / "cat.png")


def test_folder_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"'{tmp_path}' is a folder"):
        open_image(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n" + b"0" * 40])
def test_what_is_no_image_is_named(tmp_path, content) -> None:
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


# --- masks ----------------------------------------------------------------------------------------


def test_a_mask_is_white_where_it_is_white(tmp_path) -> None:
    mask = Image.new("RGB", (4, 1), BLACK)
    mask.putpixel((1, 0), WHITE)
    mask.putpixel((2, 0), (130, 130, 130))
    mask.save(tmp_path / "mask.png")
    for one in (mask, tmp_path / "mask.png", mask.convert("RGBA")):
        assert list(open_mask(one).tobytes()) == [0, 255, 255, 0]


def test_a_mask_in_which_transparency_decides_is_refused(tmp_path) -> None:
    painted = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    painted.paste((255, 255, 255, 255), (0, 0, 2, 2))
    painted.save(tmp_path / "mask.png")
    for one in (painted, tmp_path / "mask.png", painted.convert("LA"), painted.convert("PA")):
        with pytest.raises(ValueError, match="transparent in part, .* save it without"):
            open_mask(one)


# --- whatever is given ----------------------------------------------------------------------------

KINDS = {
    "PNG": "1 L LA P RGB RGBA I;16",
    "JPEG": "L RGB CMYK",
    "WEBP": "RGB RGBA",
    "GIF": "L P",
    "TIFF": "1 L LA P RGB RGBA CMYK YCbCr LAB I;16 I F",
    "BMP": "1 L P RGB RGBA",
}
READ = """
import json, re, sys
from pathlib import Path
from mmdlm.vision.image_files import open_image

found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        found[path.name] = open_image(path).size
    except ValueError as error:
        found[path.name] = str(error)
status = Path("/proc/self/status").read_text()
print(json.dumps([found, int(re.search(r"VmHWM:\\s*(\\d+)", status)[1])]))
"""


def noise(mode: str) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    image = Image.fromarray(levels)
    return image.convert("L").convert(mode) if mode in ("I", "F") else image.convert(mode)


def inputs() -> Iterator[tuple[str, bytes]]:
    """Whole, cut off, with flipped bits, misnamed, huge: a file name and a file."""
    chance = random.Random(0)
    for kind, modes in KINDS.items():
        for mode in modes.split():
            file = file_of(noise(mode), kind)
            name = f"{kind}-{mode.replace(';', '')}"
            yield f"{name}-whole.png", file
            yield f"{name}-cut.{kind.lower()}", file[: chance.randrange(len(file) - 16)]
            for number, reach in enumerate((64, len(file))):
                flipped = bytearray(file)
                for _ in range(3):
                    flipped[chance.randrange(reach)] ^= 1 << chance.randrange(8)
                yield f"{name}-flipped{number}.jpg", bytes(flipped)
    for side in (13_000, 20_000, 10**6):
        yield f"huge-{side}.png", plain_png(side, side, rows=1)
    yield "wide.png", plain_png(10**8, 1)
    yield "large.png", plain_png(13_000, 13_000)
    yield "empty.png", b""
    yield "text.png", b"BM is no image"
    yield "postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0"
    yield "random.webp", b"RIFF\xff\xff\xff\xffWEBPVP8X" + chance.randbytes(100)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_whatever_is_given_is_seen_or_refused(tmp_path) -> None:
    given = dict(inputs())
    assert len(given) > 100
    for name, file in given.items():
        (tmp_path / name).write_bytes(file)
    ran = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Warning" not in ran.stderr
    found, peak = json.loads(ran.stdout)
    assert found.keys() == given.keys()
    for name, seen in found.items():
        if "-whole" in name and not name.startswith(("TIFF-I-", "TIFF-F-")):
            assert seen == [24, 24], name
        if isinstance(seen, str):
            assert name in seen  # which file it is
    refused = [name for name, seen in found.items() if isinstance(seen, str)]
    assert len(refused) > 40
    assert peak < 1.5 * (1 << 20)  # KiB


# --- the one place --------------------------------------------------------------------------------


def decoding_calls(source: str) -> list[int]:
    """Lines that decode an image or change its mode: Image.open, .convert("...")."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="Image"), attr="open")):
                lines.append(node.lineno)
            case ast.Call(func=ast.Attribute(attr="convert"), args=[ast.Constant(value=str()), *_]):
                lines.append(node.lineno)
            case ast.ImportFrom(module="PIL", names=names) if any(
                one.name == "ImageFile" or one.name.endswith("ImagePlugin") for one in names
            ):
                lines.append(node.lineno)
    return lines


@pytest.mark.slow
def test_images_are_decoded_in_one_place(project_files: list[Path]) -> None:
    assert decoding_calls('with Image.open("x") as image:\n    image.convert("RGB")') == [1, 2]
    found = [
        f"{path}, line {line}"
        for path in project_files
        if path.suffix == ".py" and path.parts[0] in ("mmdlm", "data_pipelines", "train", "eval")
        for line in decoding_calls((ROOT / path).read_text(encoding="utf-8"))
        if path != Path("mmdlm/vision/image_files.py")
    ]
    assert not found, "read images with mmdlm.vision.image_files: " + "; ".join(found)


def test_a_jpeg_is_decoded_at_about_the_size_that_is_needed() -> None:
    file = file_of(Image.new("RGB", (1600, 1200), RED), "JPEG")
    assert open_image(file).size == (1600, 1200)
    assert open_image(file, least=128).size == (200, 150)
    assert open_image(file, least=300).size == (400, 300)
    assert open_image(file, least=9999).size == (1600, 1200)
    png = file_of(Image.new("RGB", (1600, 1200), RED), "PNG")
    assert open_image(png, least=128).size == (1600, 1200)


def test_facts_of_an_image_are_those_of_the_upright_one() -> None:
    lying = two_halves(32, 16)
    assert image_facts(file_of(lying, "JPEG", exif=orientation(6))) == (16, 32, False)
    assert image_facts(file_of(lying, "JPEG", exif=orientation(3))) == (32, 16, False)
    assert image_facts(file_of(lying.convert("RGBA"), "PNG")) == (32, 16, True)
    with pytest.raises(ValueError, match="none of PNG"):
        image_facts(b"no image")
