"""How images are cut: the published counts, nothing lost, clear words for what cannot be."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mmdlm.vision.encoders.anyres import Anyres
from mmdlm.vision.encoders.auto import tiling_from_dict
from mmdlm.vision.encoders.crops import CropViews, FeatureLayout
from mmdlm.vision.encoders.natural import Natural, Rounded
from mmdlm.vision.encoders.pooling import Pooling
from mmdlm.vision.encoders.square import Square

LLADA_V = Anyres(
    size=384, grid=27, shapes=Anyres.shapes_of("(1x1),...,(6x6)", size=384), max_tiles=4
)
LAVIDA = Anyres(
    size=384, grid=27, shapes=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), pooling=Pooling()
)
SMALL = Anyres(size=28, grid=7, shapes=((1, 1), (2, 1), (1, 2), (2, 2), (3, 1)))
SIZES = [(50, 30), (30, 50), (31, 31), (97, 40), (40, 97), (84, 28), (80, 13), (13, 80), (5, 4)]


def noise(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3))
    return Image.fromarray(levels.astype(np.uint8))


@pytest.mark.parametrize(
    "width, height, slots",
    [
        (384, 384, 1485),
        (336, 672, 2241),
        (640, 480, 2929),
        (1024, 768, 3627),
        (1920, 1080, 3649),
        (3000, 2000, 3677),
    ],
)
def test_llada_v_counts(width, height, slots) -> None:
    assert LLADA_V.layout(width, height).slots == slots


@pytest.mark.parametrize(
    "width, height, slots", [(768, 768, 1008), (1024, 768, 834), (1920, 1080, 660)]
)
def test_lavida_counts(width, height, slots) -> None:
    assert LAVIDA.layout(width, height).slots == slots


def test_several_images_are_one_padded_crop_each() -> None:
    first, second = LLADA_V.views([noise(640, 480), noise(300, 500)])
    assert (first.slots, second.slots) == (730, 730)
    assert first.crops.shape == (1, 3, 384, 384)
    assert first.crops[0, :, 0].eq(127).all()
    both = Anyres(size=28, grid=2, shapes=((1, 2),), tile_several=True)
    assert [len(views.crops) for views in both.views([noise(50, 30)] * 2)] == [3, 3]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tiling", [LLADA_V, LAVIDA, SMALL], ids=["llada_v", "lavida", "small"])
def test_only_padding_lies_outside_the_window(size, tiling) -> None:
    """Less than one feature of the image may be cut off: the one that it covers in part."""
    layout = tiling.layout(*size)
    rows, columns = (n * p for n, p in zip(layout.tiles, layout.pooled, strict=True))
    top, bottom, left, right = layout.window
    assert (top + bottom, left + right) == (rows, columns)
    scale = min(columns / size[0], rows / size[1])
    covered_rows, covered_columns = size[1] * scale, size[0] * scale
    assert covered_rows - 1 - 1e-9 < bottom - top < covered_rows + 2
    assert covered_columns - 1 - 1e-9 < right - left < covered_columns + 2
    assert top == 0 or left == 0


@pytest.mark.parametrize("size", SIZES)
def test_crops_are_the_image_and_its_tiles(size) -> None:
    image = noise(*size)
    (views,) = SMALL.views([image])
    rows, columns = views.layout.tiles
    assert views.crops.shape == (1 + rows * columns, 3, 28, 28)
    assert views.crops.dtype == torch.uint8
    squashed = np.array(image.resize((28, 28), Image.Resampling.BICUBIC))
    assert torch.equal(views.crops[0], torch.from_numpy(squashed).permute(2, 0, 1))
    # the mosaic of the tiles is the image, resized, on black
    canvas = torch.cat(
        [torch.cat(list(views.crops[1 + r * columns :][:columns]), dim=2) for r in range(rows)],
        dim=1,
    )
    scale = min(columns * 28 / size[0], rows * 28 / size[1])
    width, height = math.ceil(size[0] * scale - 1e-9), math.ceil(size[1] * scale - 1e-9)
    x, y = (columns * 28 - width) // 2, (rows * 28 - height) // 2
    resized = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    assert torch.equal(
        canvas[:, y : y + height, x : x + width], torch.from_numpy(resized).permute(2, 0, 1)
    )
    canvas[:, y : y + height, x : x + width] = 0
    assert not canvas.any()


@pytest.mark.parametrize(
    "size, shape",
    [((28, 28), (1, 1)), ((60, 30), (2, 1)), ((30, 60), (1, 2)), ((400, 400), (2, 2))],
)
def test_the_shape_that_keeps_most_and_wastes_least(size, shape) -> None:
    columns, rows = shape
    assert SMALL.layout(*size).tiles == (rows, columns)


def test_of_equal_shapes_the_first_is_taken() -> None:
    for shapes in [((1, 2), (2, 1)), ((2, 1), (1, 2))]:
        tiling = Anyres(size=28, grid=2, shapes=shapes)
        assert tiling.layout(28, 28).tiles == shapes[0][::-1]


def test_pinpoints_in_each_spelling() -> None:
    expected = ((1, 1), (1, 2), (2, 1), (2, 2))
    assert Anyres.shapes_of("(1x1),...,(2x2)", size=336) == expected
    pixels = [[336, 336], [336, 672], [672, 336], [672, 672]]
    assert Anyres.shapes_of(pixels, size=336) == expected
    assert Anyres.shapes_of(str(pixels), size=336) == expected
    for wrong in ["six by six", [[384, 336]]]:
        with pytest.raises(ValueError, match="no multiples of tiles of 336x336"):
            Anyres.shapes_of(wrong, size=336)


@pytest.mark.parametrize("size", [(700, 333), (301, 700), (64, 64), (40, 39)])
def test_padding_in_bands_is_padding_at_once(size) -> None:
    image = noise(*size)
    side = max(size)
    whole = Image.new("RGB", (side, side), (1, 2, 3))
    whole.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    expected = torch.from_numpy(np.array(whole.resize((28, 28), Image.Resampling.BICUBIC)))
    (views,) = Square(size=28, grid=7, background=(1, 2, 3)).views([image])
    assert torch.equal(views.crops[0], expected.permute(2, 0, 1))


def test_square_counts() -> None:
    assert Square(size=384, grid=27).layout(640, 480).slots == 729
    assert Square(size=384, grid=27, newline=True).layout(640, 480).slots == 730
    assert Square(size=384, grid=27, pooling=Pooling("average", 3)).layout(9, 9).slots == 81


@pytest.mark.parametrize("size", [*SIZES, (640, 480), (3000, 2000), (255, 17), (2560, 10)])
def test_natural_sizes_are_the_published_ones(size) -> None:
    published = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    width, height = size
    for most in (16, 256, 729):
        if max(size) > most * min(size):
            continue
        layout = Natural(patch=14, max_patches=most).layout(width, height)
        expected = published.get_image_size_for_max_num_patches(height, width, 14, most)
        assert (layout.patches[0] * 14, layout.patches[1] * 14) == expected
        assert layout.slots <= most


def test_natural_crop_is_the_image_resized() -> None:
    image = noise(90, 40)
    (views,) = Natural(patch=4, max_patches=64).views([image])
    rows, columns = views.layout.patches
    expected = image.resize((columns * 4, rows * 4), Image.Resampling.BILINEAR)
    assert torch.equal(views.crops[0], torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert views.slots == rows * columns


def test_transparency_is_laid_on_white() -> None:
    (views,) = Square(size=28, grid=2).views([Image.new("RGBA", (9, 9), (255, 0, 0, 0))])
    assert views.crops.eq(255).all()


# ---- the order of slots -------------------------------------------------------------------------


def test_slots_are_the_whole_then_the_rows_of_the_mosaic() -> None:
    layout = FeatureLayout((2, 2), (2, 2), tiles=(1, 2), window=(0, 2, 1, 3), newline=True)
    features = torch.arange(12.0).reshape(3, 2, 2, 1)
    slots = layout.arrange(features, torch.tensor([-1.0])).flatten().tolist()
    # tiles [[4, 5], [6, 7]] and [[8, 9], [10, 11]] side by side, without the outer columns
    assert slots == [0, 1, 2, 3, 5, 8, -1, 7, 10, -1]
    assert len(slots) == layout.slots


def test_a_mosaic_is_shrunk_in_its_own_dtype() -> None:
    layout = FeatureLayout((4, 4), (4, 4), tiles=(1, 1), window=(0, 4, 0, 4), shrunk=(2, 2))
    features = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    slots = layout.arrange(features, None)[16:].reshape(2, 2, 3)
    means = features[1].reshape(2, 2, 2, 2, 3).mean((1, 3))  # bilinear at half the size
    torch.testing.assert_close(slots, means, atol=1e-12, rtol=0)


@pytest.mark.parametrize("tiling", [LLADA_V, LAVIDA, SMALL], ids=["llada_v", "lavida", "small"])
@pytest.mark.parametrize("size", [(50, 30), (640, 480), (3000, 2000), (400, 2900)])
def test_as_many_features_as_slots(tiling, size) -> None:
    layout = tiling.layout(*size)
    features = torch.zeros(layout.crops, *layout.pooled, 1)
    assert len(layout.arrange(features, torch.ones(1))) == layout.slots


def test_views_are_moved_with_their_layout() -> None:
    (views,) = SMALL.views([noise(50, 30)])
    moved = views.map(lambda x: x.float())
    assert moved.crops.dtype == torch.float32
    assert moved.layout == views.layout
    with pytest.raises(ValueError, match="2 crops but a layout of 5"):
        CropViews(views.crops[:2], views.layout)


# ---- configs and bad input ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "tiling",
    [
        LLADA_V,
        LAVIDA,
        Natural(patch=16),
        Rounded(patch=28),
        Square(size=28, grid=2, background=(0, 9, 255), resampling="lanczos"),
    ],
    ids=lambda tiling: tiling.kind,
)
def test_tilings_and_layouts_survive_json(tiling) -> None:
    assert tiling_from_dict(json.loads(json.dumps(tiling.to_dict()))) == tiling
    layout = tiling.layout(640, 480)
    assert FeatureLayout(**json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    "tiling",
    [LLADA_V, LAVIDA, Natural(patch=16), Rounded(patch=28), Square(size=28, grid=2)],
)
def test_too_small_and_too_narrow_images_are_refused(tiling) -> None:
    with pytest.raises(ValueError, match="1x1 pixels is too small .* 4 pixels"):
        tiling.views([Image.new("RGB", (1, 1))])
    for size in [(20000, 10), (10, 20000)]:
        for count in (1, 2):
            with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels is too narrow"):
                tiling.views([Image.new("RGB", size)] * count)


def test_the_narrowest_image_covers_one_row() -> None:
    assert LLADA_V.layout(162 * 50, 50).window == (13, 14, 0, 162)
    with pytest.raises(ValueError, match="of the 162x27 features .* covers 162x0"):
        LLADA_V.layout(162 * 50 + 1, 50)
    assert Square(size=384, grid=27).layout(270, 10).slots == 729
    with pytest.raises(ValueError, match="271x10 pixels is too narrow"):
        Square(size=384, grid=27).layout(271, 10)


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"kind": "mosaic"}, "kind must be one of square, anyres, natural, rounded, not 'mosaic'"),
        ({"kind": "square", "size": 28}, "grid"),
        ({"kind": "square", "size": 28, "grid": 2, "sides": 4}, "has no 'sides'"),
        ({"kind": "square", "size": 28, "grid": 0}, "grid must be a whole number from 1, not 0"),
        ({"kind": "square", "size": 28, "grid": 2, "background": [0, 0, 256]}, "from 0 to 255"),
        ({"kind": "square", "size": 28, "grid": 2, "resampling": "cubic"}, "not 'cubic'"),
        ({"kind": "anyres", "size": 28, "grid": 2, "shapes": []}, "shapes must be pairs"),
        ({"kind": "anyres", "size": 28, "grid": 2, "shapes": [[0, 1]]}, "numbers from 1"),
        ({"kind": "anyres", "size": 28, "grid": 2, "shapes": [[1, 1]], "max_tiles": 0}, "not 0"),
        ({"kind": "natural", "patch": 14, "pooling": {"mode": "mean"}}, "not 'mean'"),
        ({"kind": "natural", "patch": 14, "pooling": {"size": 2}}, "pooling has no 'size'"),
        ({"kind": "rounded", "patch": 28, "max_pixels": 300}, "max_pixels 300 is less than min_"),
        ({"kind": "rounded", "patch": 28, "newline": True}, "no newline"),
    ],
)
def test_bad_configs_are_refused(content, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        tiling_from_dict(content)


@pytest.mark.parametrize(
    "mode, side", [("bilinear", 14), ("average", 13), ("max", 13)], ids=lambda x: str(x)
)
def test_pooled_sides(mode, side) -> None:
    pooling = Pooling(mode, 2)
    assert pooling.grid(27, 27) == (side, side)
    assert pooling(torch.zeros(2, 27, 27, 3)).shape == (2, side, side, 3)
    constant = pooling(torch.full((1, 5, 5, 1), 3.0))
    torch.testing.assert_close(constant, torch.full_like(constant, 3.0))


def test_pooling_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="2x2 patches has no window of 3x3"):
        Pooling("max", 3).grid(2, 2)


@pytest.mark.parametrize(
    "least, most", [(56 * 56, 336 * 336), (56 * 56, 1280 * 28 * 28), (784, 784)]
)
def test_rounded_sizes_are_those_of_the_published_processor(least, most) -> None:
    tiling = Rounded(patch=28, min_pixels=least, max_pixels=most)
    rng = np.random.default_rng(0)
    sizes = [(28, 28), (42, 70), (70, 98), (98, 98), (336, 336), (350, 322), (28, 5600)]
    sizes += [tuple(side) for side in rng.integers(28, 3000, (300, 2)).tolist()]
    for width, height in sizes:
        expected = smart_resize(height, width, 28, least, most)
        rows, columns = tiling.layout(width, height).patches
        assert (rows * 28, columns * 28) == expected


def test_rounded_images_have_rows_and_columns() -> None:
    (views,) = Rounded(patch=4, min_pixels=16, max_pixels=400).views([noise(13, 7)])
    assert views.crops.shape == (1, 3, 8, 12)
    assert views.places is not None
    assert views.places.tolist() == [[0, row, column] for row in range(2) for column in range(3)]
    assert SMALL.views([noise(13, 7)])[0].places is None
    pooled = Rounded(patch=4, min_pixels=16, max_pixels=400, pooling=Pooling("average"))
    assert pooled.layout(16, 8).places.tolist() == [[0, 0, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="only for one crop"):
        FeatureLayout((2, 2), (2, 2), newline=True, axes=True)
