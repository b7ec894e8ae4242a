"""Build a vision tower or a tiling by the name of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmdlm.vision.encoders.anyres import Anyres
from mmdlm.vision.encoders.natural import Natural, Rounded
from mmdlm.vision.encoders.open_clip_tower import OpenClipTower
from mmdlm.vision.encoders.square import Square
from mmdlm.vision.encoders.tiling import Tiling, build_dataclass
from mmdlm.vision.encoders.tower import Layer, Tower
from mmdlm.vision.encoders.transformers_towers import NaflexTower, QwenTower, SiglipTower


def build_tower(library: str, config: Mapping[str, Any], select_layer: Layer = -1) -> Tower:
    """Build the tower of a config, with random weights.

    Args:
        library: "transformers": `config` has the fields of SiglipVisionConfig, Siglip2VisionConfig
            or Qwen2_5_VLVisionConfig, and its `model_type`; "open_clip": see `OpenClipTower`.
        config: Sizes of the tower.
        select_layer: Whose states are the features; -1: the last one's.

    Returns:
        The tower, on the CPU.

    Raises:
        ValueError: For an unknown library, model type, field or layer.
    """
    if library == "open_clip":
        return OpenClipTower(config, select_layer)
    if library != "transformers":
        raise ValueError(
            f"vision tower: library must be 'transformers' or 'open_clip', not {library!r}"
        )
    kinds: dict[str, Callable[[Mapping[str, Any], Layer], Tower]] = {
        "siglip_vision_model": SiglipTower,
        "siglip2_vision_model": NaflexTower,
        "qwen2_5_vl_vision": QwenTower,
    }
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"vision tower: model_type must be one of {', '.join(kinds)}, not {kind!r}"
        )
    return kinds[kind](config, select_layer)


def tiling_from_dict(content: Mapping[str, Any]) -> Tiling:
    """Build a tiling from its stored fields.

    Args:
        content: What `Tiling.to_dict` gave: the kind and the fields.

    Returns:
        The tiling of that kind.

    Raises:
        ValueError: If the kind or a field is unknown.
    """
    options = dict(content)
    kinds = {tiling.kind: tiling for tiling in (Square, Anyres, Natural, Rounded)}
    kind = options.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"tiling kind must be one of {', '.join(kinds)}, not {kind!r}")
    tiling: Tiling = build_dataclass(kinds[kind], options, f"tiling {kind!r}")
    return tiling
