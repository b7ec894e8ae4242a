"""LLaDA (arXiv:2502.09992) and LLaDA 1.5: OLMo's layout, bidirectional."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.families.base import (
    Family,
    Json,
    number,
    refuse_to_write,
    refuse_unless,
    required,
    special_id,
)
from mmdlm.models.families.weight_map import OLMO_NAMES, WeightMap
from mmdlm.models.rope import rope_of

MASK_ID, EOS_ID = 126336, 126081

# What OLMo's layout could ask for, and what LLaDA asks for.
LAYOUT = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_type": "llama",
    "clip_qkv": None,
    "include_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "scale_logits": False,
}


class Llada(Family):
    """LLaDA 8B base, instruct and 1.5; the root of all families with its layout."""

    name: ClassVar[str] = "llada"
    model_types: ClassVar[tuple[str, ...]] = ("llada",)
    weights: ClassVar[WeightMap] = OLMO_NAMES

    def matches(self, config: Json) -> bool:
        return "d_model" in config and _is_text_alone(config)

    def shape(self, config: Json) -> Json:
        """OLMo's names of sizes; `multi_query_attention` is one key-value head."""
        refuse_unless(config, LAYOUT)
        width, heads = required(config, "d_model"), required(config, "n_heads")
        kv_heads = config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads)
        inner = config.get("mlp_hidden_size") or int(config.get("mlp_ratio", 4) * width)
        return {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": required(config, "n_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": config.get("max_sequence_length", 4096),
            **rope_of(config),
            "rms_norm_eps": number(config, "rms_norm_eps", default=1e-5),
            "attention_bias": bool(config.get("include_qkv_bias")),
            "tie_word_embeddings": bool(config.get("weight_tying")),
        }

    def vocabulary(self, config: Json, *, tokenizer_size: int | None = None) -> Vocabulary:
        """All ids are text."""
        size = vocabulary_size(config)
        return Vocabulary(size=size, text=(0, size), image=(size, size), **special_ids(config))

    def published_config(self, ours: Mapping[str, Any]) -> Json:
        refuse_to_write(
            ours, "LLaDA", {"qk_norm": False, "shift": False, "rope_scaling": None, "vision": None}
        )
        words = ours["vocabulary"]
        return {
            **LAYOUT,
            "architectures": ["LLaDAModelLM"],
            "model_type": "llada",
            "d_model": ours["hidden_size"],
            "mlp_hidden_size": ours["intermediate_size"],
            "n_layers": ours["num_hidden_layers"],
            "n_heads": ours["num_attention_heads"],
            "n_kv_heads": ours["num_key_value_heads"],
            "max_sequence_length": ours["max_position_embeddings"],
            "rope_theta": ours["rope_theta"],
            "rope_full_precision": True,
            "rms_norm_eps": ours["rms_norm_eps"],
            "include_qkv_bias": ours["attention_bias"],
            "weight_tying": ours["tie_word_embeddings"],
            "vocab_size": words["size"],
            "embedding_size": words["size"],
            "mask_token_id": words["mask_id"],
            "eos_token_id": words["eos_id"],
            "pad_token_id": words["pad_id"],
            "use_cache": False,
        }


def vocabulary_size(config: Json) -> int:
    """Rows of the embedding, which may be padded beyond the vocabulary."""
    return int(config.get("embedding_size") or required(config, "vocab_size"))


def special_ids(config: Json) -> dict[str, int]:
    """Mask, padding and end of text: the published ids where the config is silent."""
    size = vocabulary_size(config)
    eos = special_id(config, "eos_token_id", default=EOS_ID, size=size, last=2)
    return {
        "mask_id": special_id(config, "mask_token_id", default=MASK_ID, size=size, last=1),
        "eos_id": eos,
        "pad_id": special_id(config, "pad_token_id", default=eos, size=size, last=2),
    }


def _is_text_alone(config: Json) -> bool:
    return not config.get("codebook_size") and "mm_vision_tower" not in config
