"""Towers against the libraries that they are taken from, layer by layer."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmdlm.vision.encoders.auto import build_tower
from mmdlm.vision.encoders.projector import build_projector

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 12, **SHAPE}
NAFLEX = {"model_type": "siglip2_vision_model", "num_patches": 9, **SHAPE}
QWEN = {
    "model_type": "qwen2_5_vl_vision",
    "depth": 4,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 2,
    "window_size": 12,  # three squares of two patches a side
    "out_hidden_size": 6,
    "fullatt_block_indexes": [1, 3],
}
OPEN_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 12,
        "patch_size": 4,
        "width": 16,
        "layers": 3,
        "head_width": 8,
        "patch_dropout": 0.5,
    },
}
TIMM = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "",
        "timm_proj": "linear",
    },
}
LAYERS = [0, 1, 3, -1, -2, -4]


def crops(count: int = 3, height: int = 12, width: int = 12) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def siglip() -> SiglipVisionModel:
    torch.manual_seed(0)
    options = {key: value for key, value in SIGLIP.items() if key != "model_type"}
    return SiglipVisionModel(SiglipVisionConfig(**options, vision_use_head=False)).eval()


def naflex() -> Siglip2VisionModel:
    torch.manual_seed(0)
    options = {key: value for key, value in NAFLEX.items() if key != "model_type"}
    return Siglip2VisionModel(Siglip2VisionConfig(**options, vision_use_head=False)).eval()


@pytest.mark.parametrize("layer", [*LAYERS, "final"])
def test_siglip_gives_any_hidden_state_of_transformers(layer) -> None:
    model = siglip()
    tower = build_tower("transformers", SIGLIP, layer)
    tower.load_state_dict(model.state_dict())
    with torch.no_grad():
        out = model(crops(), output_hidden_states=True)
        features = torch.stack(tower(list(crops())))
    expected = out.last_hidden_state if layer == "final" else out.hidden_states[layer]
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", [*LAYERS, "final"])
def test_naflex_gives_any_hidden_state_of_transformers(layer) -> None:
    model = naflex().double()
    tower = build_tower("transformers", NAFLEX, layer).double()
    tower.load_state_dict(model.state_dict())
    shapes = [(2, 3), (4, 2), (1, 1)]
    images = [crops(1, rows * 4, columns * 4)[0].double() for rows, columns in shapes]
    patches = torch.zeros(3, 8, 48, dtype=torch.float64)
    mask = torch.zeros(3, 8, dtype=torch.int32)
    for i, (image, (rows, columns)) in enumerate(zip(images, shapes, strict=True)):
        for n in range(rows * columns):
            y, x = n // columns * 4, n % columns * 4
            patches[i, n] = image[:, y : y + 4, x : x + 4].permute(1, 2, 0).flatten()
            mask[i, n] = 1
    with torch.no_grad():
        out = model(patches, mask, torch.tensor(shapes), output_hidden_states=True)
        features = tower(images)
        alone = [tower([image])[0] for image in images]
    expected = out.last_hidden_state if layer == "final" else out.hidden_states[layer]
    for i, (rows, columns) in enumerate(shapes):
        assert features[i].shape == (rows * columns, 16)
        # since 5.24 transformers resizes the table of positions in float32 always
        torch.testing.assert_close(features[i], expected[i, : rows * columns], atol=2e-7, rtol=0)
        torch.testing.assert_close(features[i], alone[i], atol=2e-7, rtol=0)


def test_qwen_gives_what_leaves_the_merger_of_transformers() -> None:
    torch.manual_seed(0)
    options = {key: value for key, value in QWEN.items() if key != "model_type"}
    model = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**options)).eval()
    tower = build_tower("transformers", QWEN, "final").eval()
    tower.load_state_dict(model.state_dict())
    shapes = [(5, 7), (3, 3), (1, 4), (6, 2)]  # of squares: windows cut through some of them
    images = [crops(1, rows * 4, columns * 4)[0] for rows, columns in shapes]
    patches = []
    for image, (rows, columns) in zip(images, shapes, strict=True):
        for square in range(rows * columns):
            top, left = square // columns * 4, square % columns * 4
            for y, x in [(0, 0), (0, 2), (2, 0), (2, 2)]:
                patch = image[:, top + y : top + y + 2, left + x : left + x + 2]
                patches.append(torch.stack([patch, patch], dim=1).flatten())  # [c, frame, y, x]
    grids = torch.tensor([[1, rows * 2, columns * 2] for rows, columns in shapes])
    with torch.no_grad():
        expected = model(torch.stack(patches), grids).pooler_output
        features = tower(images)
        alone = [tower([image])[0] for image in images]
    assert [len(part) for part in features] == [rows * columns for rows, columns in shapes]
    torch.testing.assert_close(torch.cat(features), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cat(features), torch.cat(alone), atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [OPEN_CLIP, TIMM], ids=["vit", "timm"])
@pytest.mark.parametrize("layer", [1, 3, -1, -2, "final"])
def test_open_clip_gives_patches_behind_any_block(config, layer) -> None:
    pytest.importorskip("open_clip")
    torch.manual_seed(0)
    tower = build_tower("open_clip", config, layer)  # in training mode, too: no patch is dropped
    size = config["vision_cfg"]["image_size"]
    rows, columns = tower.grid(size, size)
    blocks, seen = [], {}
    for name, module in tower.visual.named_modules():
        if name.endswith((".resblocks.0", ".blocks.0")):
            blocks = tower.visual.get_submodule(name.rsplit(".", 1)[0])
        if name.endswith(("ln_post", "trunk.norm")):
            norm = module
    depth = len(blocks)
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda _m, _x, out, i=i: seen.__setitem__(i + 1, out))
    with torch.no_grad():
        features = torch.stack(tower(list(crops(2, size, size))))
        count = depth if layer == "final" else layer % (depth + 1)
        expected = norm(seen[count]) if layer == "final" else seen[count]
    assert features.shape == (2, rows * columns, tower.width)
    torch.testing.assert_close(features, expected[:, -rows * columns :])
    assert max(seen) == count  # blocks behind it do not run


@pytest.mark.parametrize(
    "library, config",
    [
        ("transformers", SIGLIP),
        ("transformers", {**SIGLIP, "vision_use_head": True}),
        ("transformers", NAFLEX),
        ("open_clip", OPEN_CLIP),
        ("open_clip", TIMM),
    ],
    ids=["siglip", "head", "naflex", "open_clip", "timm"],
)
@pytest.mark.parametrize("layer", [-1, -2, "final"])
def test_idle_parameters_are_those_without_a_gradient(library, config, layer) -> None:
    if library == "open_clip":
        pytest.importorskip("open_clip")
    tower = build_tower(library, config, layer)
    size = config.get("vision_cfg", config).get("image_size", 12)
    torch.stack(tower(list(crops(1, size, size)))).sum().backward()
    idle = {id(parameter) for parameter in tower.idle_parameters()}
    for name, parameter in tower.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in idle), name


def test_later_blocks_do_not_run() -> None:
    tower = build_tower("transformers", SIGLIP, -2)
    for parameter in tower.idle_parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    assert torch.isfinite(torch.stack(tower(list(crops())))).all()


def test_names_of_tensors_are_those_of_transformers() -> None:
    tower = build_tower("transformers", SIGLIP)
    names = {name for name in tower.state_dict() if "layers" not in name}
    parts = ("embeddings.patch_embedding", "embeddings.position_embedding", "post_layernorm")
    assert names == {f"{part}.{x}" for part in parts for x in ("weight", "bias")} - {
        "embeddings.position_embedding.bias"
    }
    assert "encoder.layers.2.self_attn.out_proj.weight" in tower.state_dict()


@pytest.mark.parametrize(
    "library, config, layer, reason",
    [
        ("timm", {}, -1, "must be 'transformers' or 'open_clip', not 'timm'"),
        ("transformers", {"hidden_size": 8}, -1, "model_type must be one of .* not None"),
        ("transformers", {**SIGLIP, "depth": 2}, -1, "SiglipVisionConfig has no 'depth'"),
        ("transformers", {**SIGLIP, "image_size": [12, 12]}, -1, "image_size must be a whole"),
        ("transformers", {**SIGLIP, "hidden_size": "wide"}, -1, "hidden_size"),
        ("transformers", {**SIGLIP, "num_attention_heads": 3}, -1, "divisible"),
        ("transformers", SIGLIP, -5, "from -4 to 3, as the tower has 3 blocks, not -5"),
        ("transformers", SIGLIP, "last", "not 'last'"),
        ("transformers", QWEN, -1, "take select_layer 'final', not -1"),
        ("transformers", {**QWEN, "heads": 2}, "final", "Qwen2_5_VLVisionConfig has no 'heads'"),
    ],
)
def test_bad_configs_are_refused(library, config, layer, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        build_tower(library, config, layer)


@pytest.mark.parametrize(
    "config, layer, reason",
    [
        ({"model": "ViT-Z-99"}, -1, "knows no model 'ViT-Z-99'"),
        ({"model": "RN50"}, -1, "ModifiedResNet has no features of patches"),
        ({"embed_dim": 8}, -1, "vision_cfg"),
        ({**OPEN_CLIP, "text_cfg": {}}, -1, "has no 'text_cfg'"),
        (OPEN_CLIP, 0, "not select_layer 0; take 1 to 3"),
    ],
)
def test_bad_open_clip_configs_are_refused(config, layer, reason) -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(ValueError, match=reason):
        build_tower("open_clip", config, layer)


def test_open_clip_is_asked_for_where_it_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"pip install 'mmdlm\[open_clip\]'"):
        build_tower("open_clip", OPEN_CLIP)


def test_crops_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="16x12 pixels, but the vision tower takes 12x12"):
        build_tower("transformers", SIGLIP).grid(12, 16)
    with pytest.raises(ValueError, match="16x13 pixels are not made of whole patches of 4"):
        build_tower("transformers", NAFLEX).grid(13, 16)
    with pytest.raises(ValueError, match="16x14 pixels are not made of whole patches of 4"):
        build_tower("transformers", QWEN, "final").grid(14, 16)


@pytest.mark.parametrize(
    "name, keys",
    [
        ("linear", ["weight", "bias"]),
        ("mlp1x_gelu", ["0.weight", "0.bias"]),
        ("mlp2x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("mlp2x_silu", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("mlp3x_gelu", [f"{i}.{x}" for i in (0, 2, 4) for x in ("weight", "bias")]),
    ],
)
def test_projectors_have_the_names_of_llava(name, keys) -> None:
    projector = build_projector(name, 6, 4)
    assert list(projector.state_dict()) == keys
    assert projector(torch.zeros(5, 6)).shape == (5, 4)


@pytest.mark.parametrize("name", ["mlp_gelu", "mlp0x_gelu", "mlp2x_relu", "resampler", ""])
def test_unknown_projectors_are_refused(name) -> None:
    with pytest.raises(ValueError, match=f"unknown projector '{name}'; take 'linear'"):
        build_projector(name, 6, 4)


def test_every_parameter_of_qwen_has_a_part_in_its_features() -> None:
    tower = build_tower("transformers", QWEN, "final")
    tower([crops(1, 16, 12)[0]])[0].sum().backward()
    assert not list(tower.idle_parameters())
    assert all(parameter.grad is not None for parameter in tower.parameters())
