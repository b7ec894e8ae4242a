"""How LLaVA and its descendants write down what they see with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from mmdlm.models.families.base import Json, required
from mmdlm.vision.encoders.adapter import VisionConfig
from mmdlm.vision.encoders.anyres import Anyres
from mmdlm.vision.encoders.pooling import Pooling
from mmdlm.vision.encoders.square import Square
from mmdlm.vision.encoders.tiling import Tiling

# SigLIP's and SigLIP 2's so400m-patch14-384. The published code names the tower and no more of it,
# drops its last layer, and takes what leaves the one before: so that layer is not in the weights.
SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
TOWER_FIELDS = ("vision_config", "vision_config_for_test")
GRAY = (127, 127, 127)


def llava_vision(config: Json, *, pooling: Pooling | None = None) -> Json:
    """Turn the `mm_*` keys of a config.json into fields of `VisionConfig`."""
    tower = dict(SO400M)
    for field in TOWER_FIELDS:  # a tower of another size says so
        given = config.get(field) or {}
        if not isinstance(given, dict):
            raise ValueError(f"config.json has {field} = {given!r}; an object {{...}} is needed")
        tower.update({name: value for name, value in given.items() if name in SO400M})
    return VisionConfig(
        tower=tower,
        tiling=_tiling(config, tower, pooling),
        projector=config.get("mm_projector_type", "linear"),
    ).to_dict()


def _tiling(config: Json, tower: Mapping[str, Any], pooling: Pooling | None) -> Tiling:
    size = int(tower["image_size"])
    grid = size // int(tower["patch_size"])
    unpad = "unpad" in config.get("mm_patch_merge_type", "flat")
    ratio = str(config.get("image_aspect_ratio") or "square")
    kind, _, most = ratio.partition("_max_")
    if kind == "anyres" and unpad:
        return Anyres(
            size=size,
            grid=grid,
            shapes=Anyres.shapes_of(required(config, "image_grid_pinpoints"), size=size),
            max_tiles=int(most) if most else None,
            pooling=pooling,
            background=GRAY,
        )
    if kind in ("square", "pad"):
        background = GRAY if kind == "pad" else None
        return Square(size=size, grid=grid, background=background, newline=unpad, pooling=pooling)
    raise ValueError(
        f"config.json has image_aspect_ratio {ratio!r} with mm_patch_merge_type "
        f"{config.get('mm_patch_merge_type')!r}; known are 'square' and 'pad', and 'anyres' or "
        "'anyres_max_N' with 'spatial_unpad'"
    )


def llava_config(vision: Mapping[str, Any]) -> Json:
    """Fields of `VisionConfig` -> the `mm_*` keys; ValueError for what LLaVA cannot say."""
    config = VisionConfig.from_dict(vision)
    tiling = config.tiling
    if config.library != "transformers" or config.select_layer != -1:
        raise ValueError(
            f"LLaVA's towers are transformers' and end with the layer that is looked at, but this "
            f"is {config.library}'s with select_layer {config.select_layer}; keep the model in our "
            "format"
        )
    if config.tower.get("model_type") != SO400M["model_type"]:
        raise ValueError(
            f"LLaVA's towers are of type {SO400M['model_type']!r}, but this is of type "
            f"{config.tower.get('model_type')!r}; keep the model in our format"
        )
    # With the defaults of what it leaves out, which are not those of so400m.
    tower = AutoConfig.for_model(**config.tower).to_dict()
    keys: Json = {
        "vision_config": {name: tower[name] for name in SO400M},
        "mm_vision_tower": "google/siglip2-so400m-patch14-384",
        "mm_hidden_size": tower["hidden_size"],
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": -2,
        "mm_patch_merge_type": "spatial_unpad" if tiling.newline else "flat",
    }
    if isinstance(tiling, Anyres):
        most = "" if tiling.max_tiles is None else f"_max_{tiling.max_tiles}"
        sizes = [[columns * tiling.size, rows * tiling.size] for columns, rows in tiling.shapes]
        return keys | {"image_aspect_ratio": f"anyres{most}", "image_grid_pinpoints": sizes}
    if isinstance(tiling, Square):
        return keys | {"image_aspect_ratio": "pad" if tiling.background else "square"}
    raise ValueError(f"LLaVA has no tiling like {tiling.kind!r}; keep the model in our format")
