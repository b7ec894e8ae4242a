"""Dimple (arXiv:2505.16990): Dream with Qwen2.5-VL's vision tower and positions on three axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mmdlm.models.families.base import Json, refuse_unless
from mmdlm.models.families.dream import Dream
from mmdlm.models.families.weight_map import LLAMA_NAMES, WeightMap
from mmdlm.vision.encoders.adapter import VisionConfig
from mmdlm.vision.encoders.natural import Rounded

# Qwen2.5-VL 7B's vision transformer, which stands in for what a config.json leaves out.
TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
SECTIONS = [16, 24, 24]  # pairs of channels that turn with the moment, the row and the column
# Least and most pixels of an image. It was trained on no more than 24x24 patches; its config.json
# says nothing of this, its preprocessor_config.json does.
MIN_PIXELS, MAX_PIXELS = 56 * 56, (24 * 14) ** 2
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Ids of Qwen2's tokenizer around and in place of an image.
MARKERS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
}
DIMPLE_NAMES = WeightMap(
    (
        ("visual.{rest}", "vision.tower.{rest}"),
        ("img_projector.linear_1.{rest}", "vision.projector.0.{rest}"),
        ("img_projector.linear_2.{rest}", "vision.projector.2.{rest}"),
    )
)


class Dimple(Dream):
    """Dimple 7B. Its projector has the language model's SiLU between its two matrices."""

    name: ClassVar[str] = "dimple"
    model_types: ClassVar[tuple[str, ...]] = ("dimple", "Dimple")
    weights: ClassVar[WeightMap] = DIMPLE_NAMES + LLAMA_NAMES

    def shape(self, config: Json) -> Json:
        """Dream's, with the axes of its positions and what it sees with."""
        refuse_unless(config, {"full_attn_mask": True})
        return {
            **super().shape(config),
            "rope_sections": list(config.get("mrope_section") or SECTIONS),
            "vision": _vision(config).to_dict(),
        }

    def published_config(self, ours: Mapping[str, Any]) -> Json:
        if ours.get("vision") is None or ours.get("rope_sections") is None:
            raise ValueError(
                "Dimple sees, and has positions on three axes, but this model does not; write it "
                "as 'dream'"
            )
        vision = VisionConfig.from_dict(ours["vision"])
        tower = {name: value for name, value in vision.tower.items() if name != "model_type"}
        config = {
            **super().published_config({**ours, "vision": None}),
            **MARKERS,
            "architectures": ["DimpleModel"],
            "model_type": "dimple",
            "mrope_section": list(ours["rope_sections"]),
            "full_attn_mask": True,
            "vision_config": tower,
        }
        if _vision(config).to_dict() != vision.to_dict():
            raise ValueError(
                "Dimple has one way to see, with Qwen2.5-VL's tower, images of at most 24x24 "
                "patches and an MLP with a SiLU, but this model has another; keep it in our format"
            )
        return config


def _vision(config: Json) -> VisionConfig:
    """Return the vision fields of a config.json."""
    given = config.get("vision_config") or {}
    if not isinstance(given, dict):
        raise ValueError(f"config.json has vision_config = {given!r}; an object {{...}} is needed")
    tower = TOWER | {name: value for name, value in given.items() if name in TOWER}
    return VisionConfig(
        tower={"model_type": "qwen2_5_vl_vision", **tower},
        tiling=Rounded(
            patch=tower["patch_size"] * tower["spatial_merge_size"],
            min_pixels=MIN_PIXELS,
            max_pixels=MAX_PIXELS,
        ),
        select_layer="final",
        projector="mlp2x_silu",
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )
