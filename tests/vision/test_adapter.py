"""The adapter against a plain float64 computation, against itself, and against LLaDA-V's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmdlm.core.sequence import Sequence, collate, image_segment, text_segment
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.vision.encoders.adapter import VisionAdapter, VisionConfig
from mmdlm.vision.encoders.anyres import Anyres
from mmdlm.vision.encoders.crops import CropViews, FeatureLayout
from mmdlm.vision.encoders.natural import Natural
from mmdlm.vision.encoders.pooling import Pooling
from mmdlm.vision.encoders.square import Square

ROOT = Path(__file__).parents[2]
VECTORS = Path(os.environ.get("MMDLM_VECTORS") or ROOT.parent / "shared" / "vectors")

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 20, **SHAPE}
NAFLEX = {"model_type": "siglip2_vision_model", "num_patches": 9, **SHAPE}
SHAPES = ((1, 1), (2, 1), (1, 2), (2, 2))
ANYRES = Anyres(size=20, grid=5, shapes=SHAPES, max_tiles=1)
POOLED = Anyres(size=20, grid=5, shapes=SHAPES, pooling=Pooling())
FLAT = Square(size=20, grid=5)


def build(tiling=ANYRES, *, tower=SIGLIP, seed: int = 0, width: int = 8, **options):
    torch.manual_seed(seed)
    config = VisionConfig(tower=tower, tiling=tiling, **options)
    return VisionAdapter(config, width).eval()


def noise(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3))
    return Image.fromarray(levels.astype(np.uint8))


def views_of(adapter: VisionAdapter, *sizes: tuple[int, int]) -> list[CropViews]:
    """Each image in a conversation of its own."""
    tiling = adapter.config.tiling
    return [view for size in sizes for view in tiling.views([noise(*size)])]


def calls_of(adapter: VisionAdapter) -> list[int]:
    """Number of crops in each pass of the tower, from now on."""
    calls: list[int] = []
    adapter.tower.register_forward_hook(lambda _m, x, _out: calls.append(len(x[0])))
    return calls


def tower_by_hand(weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """SigLIP in float64, [C, 3, S, S] -> [C, P, D], before its closing norm."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * weights[name + ".weight"] + weights[name + ".bias"]

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    count, side = len(pixels), pixels.shape[-1] // 4
    patches = pixels.reshape(count, 3, side, 4, side, 4).permute(0, 2, 4, 1, 3, 5)
    kernel = weights["embeddings.patch_embedding.weight"].reshape(16, -1)
    x = patches.reshape(count, side**2, -1) @ kernel.T + weights["embeddings.patch_embedding.bias"]
    x = x + weights["embeddings.position_embedding.weight"]
    for i in range(2):
        at = f"encoder.layers.{i}."
        h = norm(at + "layer_norm1", x)
        query, key, value = (
            linear(f"{at}self_attn.{name}_proj", h).reshape(count, -1, 2, 8).transpose(1, 2)
            for name in "qkv"
        )
        attention = (query @ key.transpose(2, 3) / 8**0.5).softmax(-1) @ value
        attention = attention.transpose(1, 2).reshape(count, -1, 16)
        x = x + linear(at + "self_attn.out_proj", attention)
        h = gelu(linear(at + "mlp.fc1", norm(at + "layer_norm2", x)))
        x = x + linear(at + "mlp.fc2", h)
    return x


def bilinear(grid: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[h, w, D] -> [rows, columns, D], each target center between its four nearest."""
    height, width = grid.shape[:2]
    out = torch.zeros(rows, columns, grid.shape[2], dtype=grid.dtype)
    for i in range(rows):
        for j in range(columns):
            y = max(0.0, (i + 0.5) * height / rows - 0.5)
            x = max(0.0, (j + 0.5) * width / columns - 0.5)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            v, u = y - y0, x - x0
            upper = grid[y0, x0] * (1 - u) + grid[y0, x1] * u
            lower = grid[y1, x0] * (1 - u) + grid[y1, x1] * u
            out[i, j] = upper * (1 - v) + lower * v
    return out


@pytest.mark.parametrize("size", [(40, 40), (60, 33), (33, 60), (20, 20)])
@pytest.mark.parametrize("tiling", [ANYRES, POOLED], ids=["shrunk", "pooled"])
def test_equals_a_plain_computation(tiling, size) -> None:
    adapter = build(tiling).double()
    (views,) = views_of(adapter, size)
    weights = {name: value.double() for name, value in adapter.state_dict().items()}
    tower = {
        name.removeprefix("tower."): x for name, x in weights.items() if name.startswith("tower.")
    }
    x = tower_by_hand(tower, views.crops.double() / 255 * 2 - 1)
    for i in (0, 2):
        x = x @ weights[f"projector.{i}.weight"].T + weights[f"projector.{i}.bias"]
        x = x if i else 0.5 * x * (1 + torch.erf(x / 2**0.5))
    grids = list(x.reshape(len(x), 5, 5, 8))
    if tiling.pooling:
        grids = [bilinear(grid, 3, 3) for grid in grids]
    rows, columns = views.layout.tiles
    mosaic = torch.cat(
        [torch.cat(grids[1 + r * columns :][:columns], dim=1) for r in range(rows)], dim=0
    )
    top, bottom, left, right = views.layout.window
    mosaic = mosaic[top:bottom, left:right]
    if views.layout.shrunk:
        mosaic = bilinear(mosaic, *views.layout.shrunk)
    expected = list(grids[0].flatten(0, 1))
    for row in mosaic:
        expected += [*row, weights["newline"]]
    with torch.no_grad():
        features = adapter([views])
    # pixels are normalized in float32
    torch.testing.assert_close(features, torch.stack(expected), atol=1e-6, rtol=0)


def test_some_mosaics_of_these_tests_are_shrunk_and_some_are_cut() -> None:
    layouts = [ANYRES.layout(*size) for size in [(40, 40), (60, 33), (33, 60), (20, 20)]]
    assert any(layout.shrunk for layout in layouts)
    assert not all(layout.shrunk for layout in layouts)
    assert any(layout.window[0] for layout in layouts)
    assert any(layout.window[2] for layout in layouts)


@pytest.mark.parametrize(
    "tiling, tower",
    [(ANYRES, SIGLIP), (POOLED, SIGLIP), (FLAT, SIGLIP), (Natural(patch=4), NAFLEX)],
    ids=["anyres", "pooled", "square", "natural"],
)
def test_a_image_alone_is_the_same_image_beside_others(tiling, tower) -> None:
    adapter = build(tiling, tower=tower)
    views = views_of(adapter, (40, 40), (33, 21), (20, 20), (18, 44))
    with torch.no_grad():
        together = adapter(views).split([view.slots for view in views])
        for view, features in zip(views, together, strict=True):
            torch.testing.assert_close(adapter([view]), features, atol=1e-6, rtol=0)


def test_one_pass_over_the_crops_of_all_images() -> None:
    adapter = build()
    views = views_of(adapter, (40, 40), (20, 20))
    calls = calls_of(adapter)
    with torch.no_grad():
        at_once = adapter(views)
        assert calls == [5 + 2]
        adapter.crops_per_pass = 3
        in_parts = adapter(views)
        assert calls == [5 + 2, 3, 3, 1]
    torch.testing.assert_close(at_once, in_parts, atol=1e-6, rtol=0)


def test_copies_of_a_image_are_looked_at_once() -> None:
    adapter = build()
    (view,) = views_of(adapter, (40, 40))
    calls = calls_of(adapter)
    with torch.no_grad():
        first, second = adapter([view, view]).chunk(2)
    assert calls == [5]
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "tiling, tower", [(POOLED, SIGLIP), (Natural(patch=4), NAFLEX)], ids=["pooled", "natural"]
)
def test_features_computed_ahead_stand_in_for_pixels(tiling, tower) -> None:
    adapter = build(tiling, tower=tower)
    views = views_of(adapter, (40, 40), (33, 21))
    with torch.no_grad():
        expected = adapter(views)
        seen = adapter.look(views)
        assert all(view.crops.shape[2] == 16 for view in seen)
        # what a shard holds: a tensor, and the layout as JSON
        stored = [
            CropViews(v.crops.clone(), FeatureLayout(**json.loads(json.dumps(v.layout.to_dict()))))
            for v in seen
        ]
        calls = calls_of(adapter)
        assert torch.equal(adapter(stored), expected)
        assert calls == []
        mixed = [stored[0], views[1]]
        torch.testing.assert_close(adapter(mixed), expected, atol=1e-6, rtol=0)


def test_gradients_reach_each_part_that_is_not_frozen() -> None:
    adapter = build().train()
    views = views_of(adapter, (40, 40))
    adapter(views).pow(2).sum().backward()
    idle = {id(parameter) for parameter in adapter.tower.idle_parameters()}
    for name, parameter in adapter.named_parameters():
        if id(parameter) in idle:
            assert not parameter.requires_grad, name
        else:
            assert parameter.grad is not None, name
            assert name.endswith("k_proj.bias") or parameter.grad.any(), name  # no effect: softmax


def test_a_frozen_tower_keeps_no_activations() -> None:
    adapter = build().train()
    adapter.tower.requires_grad_(False)
    views = views_of(adapter, (40, 40))
    assert not adapter.look(views)[0].crops.requires_grad
    adapter(views).pow(2).sum().backward()
    assert all(parameter.grad is None for parameter in adapter.tower.parameters())
    assert all(parameter.grad.any() for parameter in adapter.projector.parameters())
    assert adapter.newline.grad.any()
    # so does one behind stored features, trained or not
    tower = build().train()
    tower([view.map(torch.detach) for view in tower.look(views)]).sum().backward()
    assert all(parameter.grad is None for parameter in tower.tower.parameters())
    assert tower.newline.grad.any()


def test_a_batch_takes_the_features_of_its_images() -> None:
    adapter = build()
    vocabulary = Vocabulary.build(text_size=20, eos_id=0, image_codes=0)
    views = views_of(adapter, (40, 40), (33, 21))
    rows = []
    for view in views:
        question, answer = text_segment([1, 2]), text_segment([3], target=True)
        rows.append(Sequence((question, image_segment(view, vocabulary), answer)))
    batch = collate(rows, vocabulary).to("cpu")
    with torch.no_grad():
        features = adapter(batch.views)
    assert len(features) == sum(view.slots for view in views)


def test_half_precision() -> None:
    adapter = build().bfloat16()
    views = views_of(adapter, (40, 40))
    with torch.no_grad():
        features = adapter(views)
        expected = adapter.float()(views)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), expected, atol=0.05, rtol=0.05)


def test_levels_and_normalized_pixels_are_the_same_image() -> None:
    adapter = build(FLAT, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.2))
    (view,) = views_of(adapter, (30, 30))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.4, 0.2])
    pixels = view.map(lambda x: (x / 255 - mean[:, None, None]) / std[:, None, None])
    with torch.no_grad():
        torch.testing.assert_close(adapter([view]), adapter([pixels]), atol=1e-6, rtol=0)


def test_names_of_tensors() -> None:
    names = set(build(Anyres(size=20, grid=5, shapes=SHAPES)).state_dict())
    assert "newline" in names
    assert {name for name in names if name.startswith("projector.")} == {
        f"projector.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")
    }
    assert "tower.encoder.layers.1.mlp.fc2.bias" in names
    assert build(FLAT).newline is None


def test_inside_a_model_of_transformers(tmp_path) -> None:
    from safetensors import safe_open
    from transformers import PreTrainedConfig, PreTrainedModel

    class Config(PreTrainedConfig):
        model_type = "sees"
        vision: dict | None = None

    class Model(PreTrainedModel):
        config_class = Config

        def __init__(self, config) -> None:
            super().__init__(config)
            self.vision = VisionAdapter(VisionConfig.from_dict(config.vision), 8)
            self.post_init()

    config = VisionConfig(tower=SIGLIP, tiling=ANYRES)
    model = Model(Config(vision=config.to_dict())).eval()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    again = Model.from_pretrained(tmp_path)
    views = views_of(model.vision, (40, 40))
    with torch.no_grad():
        assert torch.equal(model.vision(views), again.vision(views))


# ---- configs and bad input ----------------------------------------------------------------------


@pytest.mark.parametrize("tiling", [ANYRES, POOLED, FLAT, Natural(patch=4)])
def test_configs_survive_json(tiling) -> None:
    config = VisionConfig(tower=SIGLIP, tiling=tiling, select_layer="final", projector="linear")
    content = json.loads(json.dumps(config.to_dict()))
    assert VisionConfig.from_dict(content) == config
    assert VisionConfig(**content) == config


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"crop": 3}, "vision config has no 'crop'"),
        ({"library": "timm"}, "library must be one of .* not 'timm'"),
        ({"projector": "qformer"}, "unknown projector 'qformer'"),
        ({"select_layer": 3}, "from -3 to 2, as the tower has 2 blocks, not 3"),
        ({"mean": [0.5]}, "mean must be three numbers"),
        ({"std": [0.5, 0.5, 0]}, "std must be positive"),
        ({"tower": "siglip"}, "tower must be a config, not 'siglip'"),
        ({"tiling": {"kind": "square", "size": 24, "grid": 6}}, "24x24 pixels, but .* 20x20"),
        ({"tiling": {"kind": "square", "size": 20, "grid": 4}}, "grid 4, but its tower sees 5x5"),
        ({"tiling": {"kind": "natural", "patch": 4}}, "natural tiling needs .* siglip2"),
        ({"tiling": None}, "tiling must be a Tiling"),
    ],
)
def test_bad_configs_are_refused(changes, reason) -> None:
    content = VisionConfig(tower=SIGLIP, tiling=ANYRES).to_dict()
    with pytest.raises(ValueError, match=reason):
        VisionAdapter(VisionConfig.from_dict({**content, **changes}), 8)


def test_views_of_another_model_are_refused() -> None:
    adapter = build()
    layout = FeatureLayout((5, 5), (5, 5))
    cases = [
        (Square(size=24, grid=6).views([noise(30, 30)])[0], "24x24 pixels, but .* takes 20x20"),
        (Square(size=20, grid=4).views([noise(30, 30)])[0], "4x4 patches a crop, but .* sees 5x5"),
        (views_of(build(POOLED), (30, 30))[0], "3x3 features a crop.* makes 5x5"),
        (CropViews(torch.zeros(1, 25, 12), layout), r"\[25, 12\] a crop.* need \[25, 16\]"),
        (CropViews(torch.zeros(1, 9, 16), layout), r"\[9, 16\] a crop, but its 25 patches"),
        (CropViews(torch.zeros(1, 20, 20, 3), layout), "pixels .* or features .* are needed"),
        (torch.zeros(3), "looks at views of its tiling, not at Tensor"),
    ]
    for views, reason in cases:
        with pytest.raises(ValueError, match=reason):
            adapter([views])
    with pytest.raises(ValueError, match="newline True, but .* newline False"):
        build(FLAT)(views_of(adapter, (30, 30)))
    with pytest.raises(ValueError, match="no images"):
        adapter([])


# ---- LLaDA-V's own outputs ----------------------------------------------------------------------


def llada_v_vectors() -> list:
    found = [
        path.parent
        for path in sorted(VECTORS.glob("*/config.json"))
        if "vision_config_for_test" in json.loads(path.read_text())
    ]
    if not found:
        reason = f"no LLaDA-V vectors in {VECTORS}; set MMDLM_VECTORS to their folder"
        return [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(path, id=path.name) for path in found]


@pytest.mark.parametrize("folder", llada_v_vectors())
def test_sees_what_llada_v_sees(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    shape = {k: v for k, v in config["vision_config_for_test"].items() if k != "note"}
    side = shape["image_size"]
    tiling = Anyres(
        size=side,
        grid=side // shape["patch_size"],
        shapes=Anyres.shapes_of(config["image_grid_pinpoints"], size=side),
        max_tiles=int(config["image_aspect_ratio"].removeprefix("anyres_max_")),
    )
    tower = {"model_type": "siglip_vision_model", **shape}
    adapter = VisionAdapter(
        VisionConfig(tower=tower, tiling=tiling, projector=config["mm_projector_type"]),
        config["hidden_size"],
    )
    weights = load_file(folder / "model.safetensors")
    theirs = {
        "model.vision_tower.vision_tower.vision_model.": "tower.",
        "model.mm_projector.": "projector.",
        "model.image_newline": "newline",
    }
    ours = {
        name.replace(old, new): tensor
        for name, tensor in weights.items()
        for old, new in theirs.items()
        if name.startswith(old)
    }
    adapter.load_state_dict(ours)
    expected = load_file(folder / "expected.safetensors")
    (views,) = tiling.views([Image.open(folder / "image.png")])
    assert torch.equal(views.crops, expected["pixel_values_u8"])
    with torch.no_grad():
        seen = adapter.look([views])
        features = adapter(seen)
    torch.testing.assert_close(
        seen[0].crops[0], expected["tower_features_crop0"], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(features, expected["image_embeds"], atol=1e-4, rtol=0)
