"""SDAR (arXiv:2510.06303): Qwen3 made block-causal."""

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

MASK_ID, EOS_ID = 151669, 151643
BLOCK = 4  # tokens; that of the main checkpoints, whose config.json may not say it
HEAD_DIM = 128

LAYOUT = {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}


class Sdar(Family):
    """SDAR 1.7B, 4B and 8B; the mixture of experts is not among them."""

    name: ClassVar[str] = "sdar"
    model_types: ClassVar[tuple[str, ...]] = ("sdar",)
    weights: ClassVar[WeightMap] = LLAMA_NAMES

    def matches(self, config: Json) -> bool:
        return "hidden_size" in config

    def shape(self, config: Json) -> Json:
        """Qwen3's names of sizes; `block_size` is ours `block_length`."""
        refuse_unless(config, LAYOUT)
        return {
            **llama_shape({"head_dim": HEAD_DIM, **config}),
            "qk_norm": True,
            "block_length": config.get("block_size", BLOCK),
        }

    def vocabulary(self, config: Json, *, tokenizer_size: int | None = None) -> Vocabulary:
        """All ids are text."""
        return text_vocabulary(config, mask_id=MASK_ID, eos_id=EOS_ID)

    def published_config(self, ours: Mapping[str, Any]) -> Json:
        refuse_to_write(
            ours,
            "SDAR",
            {"attention_bias": False, "shift": False, "qk_norm": True, "vision": None},
        )
        words = ours["vocabulary"]
        return {
            **LAYOUT,
            **llama_config(ours),
            "architectures": ["SDARForCausalLM"],
            "model_type": "sdar",
            "block_size": ours["block_length"],
            "mask_token_id": words["mask_id"],
            "eos_token_id": words["eos_id"],
            "bos_token_id": words["eos_id"],
            "pad_token_id": words["pad_id"],
        }
