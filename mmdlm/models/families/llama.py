"""What Llama and its descendants (Qwen, Dream, LLaDA-V) call their sizes: nearly as we do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.families.base import Json, number, required, special_id
from mmdlm.models.rope import rope_of

SAME_NAME = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def llama_shape(config: Json) -> Json:
    """Llama's names of sizes, which are ours; what is missing has Llama's default."""
    heads = required(config, "num_attention_heads")
    return {
        "hidden_size": required(config, "hidden_size"),
        "intermediate_size": required(config, "intermediate_size"),
        "num_hidden_layers": required(config, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim"),
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "rms_norm_eps": number(config, "rms_norm_eps", default=1e-6),
        **rope_of(config),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
    }


def llama_config(ours: Mapping[str, Any]) -> Json:
    """Invert `llama_shape`."""
    return {
        **{name: ours[name] for name in SAME_NAME},
        "num_key_value_heads": ours["num_key_value_heads"],
        "head_dim": ours["head_dim"],
        "max_position_embeddings": ours["max_position_embeddings"],
        "rope_theta": ours["rope_theta"],
        "rope_scaling": ours.get("rope_scaling"),
        "vocab_size": ours["vocabulary"]["size"],
        "hidden_act": "silu",
    }


def text_vocabulary(
    config: Json, *, mask_id: int, eos_id: int, pad_id: int | None = None
) -> Vocabulary:
    """Return the vocabulary of a model whose ids are all text.

    Args:
        config: As published.
        mask_id: Where the config has none.
        eos_id: Where the config has none.
        pad_id: Where the config has none; None: the end of text.

    Returns:
        Its vocabulary.
    """
    size = int(required(config, "vocab_size"))
    eos = special_id(config, "eos_token_id", default=eos_id, size=size, last=2)
    pad = eos if pad_id is None else pad_id
    return Vocabulary(
        size=size,
        text=(0, size),
        image=(size, size),
        mask_id=special_id(config, "mask_token_id", default=mask_id, size=size, last=1),
        eos_id=eos,
        pad_id=special_id(config, "pad_token_id", default=pad, size=size, last=2),
    )
