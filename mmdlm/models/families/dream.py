"""Dream (arXiv:2508.15487): Qwen2.5 made bidirectional, each state predicting the next token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.families.base import (
    Family,
    Json,
    refuse_to_write,
    refuse_unless,
)
from mmdlm.models.families.llama import llama_config, llama_shape, text_vocabulary
from mmdlm.models.families.weight_map import LLAMA_NAMES, WeightMap

MASK_ID, EOS_ID = 151666, 151643

LAYOUT = {"hidden_act": "silu", "use_sliding_window": False}


class Dream(Family):
    """Dream 7B base and instruct."""

    name: ClassVar[str] = "dream"
    model_types: ClassVar[tuple[str, ...]] = ("Dream", "dream")
    weights: ClassVar[WeightMap] = LLAMA_NAMES

    def matches(self, config: Json) -> bool:
        return "hidden_size" in config and "mm_vision_tower" not in config

    def shape(self, config: Json) -> Json:
        """Qwen2's names of sizes, a bias on queries, keys and values."""
        refuse_unless(config, LAYOUT)
        return {**llama_shape(config), "attention_bias": True, "shift": True}

    def vocabulary(self, config: Json, *, tokenizer_size: int | None = None) -> Vocabulary:
        """All ids are text."""
        return text_vocabulary(config, mask_id=MASK_ID, eos_id=EOS_ID)

    def published_config(self, ours: Mapping[str, Any]) -> Json:
        refuse_to_write(
            ours, "Dream", {"attention_bias": True, "shift": True, "qk_norm": False, "vision": None}
        )
        words = ours["vocabulary"]
        return {
            **LAYOUT,
            **llama_config(ours),
            "architectures": ["DreamModel"],
            "model_type": "Dream",
            "mask_token_id": words["mask_id"],
            "eos_token_id": words["eos_id"],
            "bos_token_id": words["eos_id"],
            "pad_token_id": words["pad_id"],
        }
