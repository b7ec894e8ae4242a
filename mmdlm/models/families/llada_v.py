"""LLaDA-V (arXiv:2505.16933): LLaDA under Llama's names, and SigLIP 2 to see with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.families.base import Family, Json, refuse_to_write, refuse_unless
from mmdlm.models.families.llada import special_ids, vocabulary_size
from mmdlm.models.families.llama import llama_config, llama_shape
from mmdlm.models.families.llava import llava_config, llava_vision
from mmdlm.models.families.weight_map import LLAMA_NAMES, LLAVA_NAMES, WeightMap


class LladaV(Family):
    """LLaDA-V; without `mm_vision_tower` only its language model, whose model type is LLaDA's."""

    name: ClassVar[str] = "llada_v"
    model_types: ClassVar[tuple[str, ...]] = ("llava_llada", "llada")
    weights: ClassVar[WeightMap] = LLAVA_NAMES + LLAMA_NAMES

    def matches(self, config: Json) -> bool:
        return "hidden_size" in config and "d_model" not in config

    def shape(self, config: Json) -> Json:
        refuse_unless(config, {"hidden_act": "silu"})
        vision = llava_vision(config) if config.get("mm_vision_tower") else None
        bias = bool(config.get("attention_bias"))
        return {**llama_shape(config), "attention_bias": bias, "vision": vision}

    def vocabulary(self, config: Json, *, tokenizer_size: int | None = None) -> Vocabulary:
        """All ids are text. The published config names no mask, and a wrong begin of text."""
        size = vocabulary_size(config)
        return Vocabulary(size=size, text=(0, size), image=(size, size), **special_ids(config))

    def published_config(self, ours: Mapping[str, Any]) -> Json:
        refuse_to_write(ours, "LLaDA-V", {"qk_norm": False, "shift": False})
        vision = {} if ours.get("vision") is None else llava_config(ours["vision"])
        words = ours["vocabulary"]
        return {
            **llama_config(ours),
            **vision,
            "architectures": ["LlavaLLaDAModelLM"],
            "model_type": "llava_llada",
            "attention_bias": ours["attention_bias"],
            "mask_token_id": words["mask_id"],
            "eos_token_id": words["eos_id"],
            "pad_token_id": words["pad_id"],
        }
