"""Fast-dLLM v2 (arXiv:2509.26328): Qwen2.5 made block-causal, its shift by one token kept."""

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

MASK_ID, EOS_ID, PAD_ID = 151665, 151645, 151643
BLOCK = 32

LAYOUT = {"hidden_act": "silu", "use_sliding_window": False}


class FastDllm(Family):
    """Fast-dLLM v2 1.5B and 7B."""

    name: ClassVar[str] = "fast_dllm"
    model_types: ClassVar[tuple[str, ...]] = ("Fast_dLLM_Qwen",)
    weights: ClassVar[WeightMap] = LLAMA_NAMES

    def matches(self, config: Json) -> bool:
        return "hidden_size" in config

    def shape(self, config: Json) -> Json:
        """Qwen2's names of sizes, a bias on queries, keys and values; `bd_size` is a block."""
        refuse_unless(config, LAYOUT)
        return {
            **llama_shape(config),
            "attention_bias": True,
            "shift": True,
            "block_length": config.get("bd_size", BLOCK),
        }

    def vocabulary(self, config: Json, *, tokenizer_size: int | None = None) -> Vocabulary:
        """All ids are text."""
        return text_vocabulary(config, mask_id=MASK_ID, eos_id=EOS_ID, pad_id=PAD_ID)

    def published_config(self, ours: Mapping[str, Any]) -> Json:
        refuse_to_write(
            ours,
            "Fast-dLLM v2",
            {"attention_bias": True, "shift": True, "qk_norm": False, "vision": None},
        )
        words = ours["vocabulary"]
        return {
            **LAYOUT,
            **llama_config(ours),
            "architectures": ["Fast_dLLM_QwenForCausalLM"],
            "model_type": "Fast_dLLM_Qwen",
            "bd_size": ours["block_length"],
            "mask_token_id": words["mask_id"],
            "eos_token_id": words["eos_id"],
            "bos_token_id": words["pad_id"],
            "pad_token_id": words["pad_id"],
        }
