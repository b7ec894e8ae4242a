"""LaViDa (arXiv:2505.16839): LLaDA or Dream under their own names, and SigLIP in five views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mmdlm.models.families.base import Json
from mmdlm.models.families.dream import Dream
from mmdlm.models.families.llada import Llada
from mmdlm.models.families.llava import llava_config, llava_vision
from mmdlm.models.families.weight_map import LLAMA_NAMES, LLAVA_NAMES, OLMO_NAMES, WeightMap
from mmdlm.vision.encoders.pooling import Pooling

# Its code pools every image, whatever the config says; LLaDA-V's pools only videos.
POOLING = Pooling("bilinear", stride=2)


class LavidaLlada(Llada):
    """LaViDa on LLaDA 8B."""

    name: ClassVar[str] = "lavida_llada"
    model_types: ClassVar[tuple[str, ...]] = ("llava_llada",)
    weights: ClassVar[WeightMap] = LLAVA_NAMES + OLMO_NAMES

    def matches(self, config: Json) -> bool:
        return "d_model" in config and bool(config.get("mm_vision_tower"))

    def shape(self, config: Json) -> Json:
        return {**super().shape(config), "vision": llava_vision(config, pooling=POOLING)}

    def published_config(self, ours: Mapping[str, Any]) -> Json:
        return _seeing(super().published_config({**ours, "vision": None}), ours) | {
            "architectures": ["LlavaLladaForMaskedDiffusion"],
            "model_type": "llava_llada",
        }


class LavidaDream(Dream):
    """LaViDa on Dream 7B."""

    name: ClassVar[str] = "lavida_dream"
    model_types: ClassVar[tuple[str, ...]] = ("llava_dream",)
    weights: ClassVar[WeightMap] = LLAVA_NAMES + LLAMA_NAMES

    def matches(self, config: Json) -> bool:
        return "hidden_size" in config and bool(config.get("mm_vision_tower"))

    def shape(self, config: Json) -> Json:
        return {**super().shape(config), "vision": llava_vision(config, pooling=POOLING)}

    def published_config(self, ours: Mapping[str, Any]) -> Json:
        return _seeing(super().published_config({**ours, "vision": None}), ours) | {
            "architectures": ["LlavaDreamForMaskedDiffusion"],
            "model_type": "llava_dream",
        }


def _seeing(config: Json, ours: Mapping[str, Any]) -> Json:
    """Return the language model's config with the vision tower of LaViDa."""
    if ours.get("vision") is None:
        raise ValueError("LaViDa sees, but this model does not; write it as 'llada' or 'dream'")
    return config | llava_config(ours["vision"])
