"""What an autoregressive checkpoint (Llama, Mistral, Qwen2, Qwen3) is as our Transformer."""

from __future__ import annotations

import copy
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from mmdlm.models.families.base import Json, refuse_unless
from mmdlm.models.families.llama import llama_shape

# By `model_type` of transformers: what our config has to say about it.
AUTOREGRESSIVE: dict[str, Json] = {
    "llama": {"attention_bias": False, "qk_norm": False},
    "mistral": {"attention_bias": False, "qk_norm": False},
    "qwen2": {"attention_bias": True, "qk_norm": False},
    "qwen3": {"attention_bias": False, "qk_norm": True},
}

# What their configs could ask for beyond the one Transformer.
LAYOUT = {
    "hidden_act": "silu",
    "attention_bias": False,  # it would put a bias on the output projection, too
    "mlp_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "quantization_config": None,
}


def shape_of_autoregressive(config: Json) -> Json:
    """Their config.json -> fields of `MmdlmConfig`, the vocabulary and `shift` apart.

    The names of the tensors are ours already. Raises ValueError for a type that is not in
    `AUTOREGRESSIVE` and for an option that the one Transformer does not have: sliding windows
    that are narrower than the longest row, biases elsewhere than on queries, keys and values.
    """
    kind = config.get("model_type")
    if kind not in AUTOREGRESSIVE:
        raise ValueError(
            f"an autoregressive model of type {kind!r} is not known here; known are "
            f"{', '.join(AUTOREGRESSIVE)}"
        )
    refuse_unless(config, LAYOUT)
    full = _with_defaults(config)
    _refuse_windows(full)
    rope = dict(full.rope_parameters)
    theta, stretched = float(rope.pop("rope_theta")), rope.get("rope_type") != "default"
    refuse_unless({"partial_rotary_factor": 1.0, **rope}, {"partial_rotary_factor": 1.0})
    return {
        **llama_shape({**full.to_dict(), "rope_theta": theta}),
        "rope_scaling": rope if stretched else None,
        **AUTOREGRESSIVE[kind],
    }


def _with_defaults(config: Json) -> PreTrainedConfig:
    """Return transformers' config: fields that are left out have its type's defaults."""
    fields: dict[str, Any] = copy.deepcopy(config)  # transformers writes into nested ones
    kind = fields.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **fields)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config.json is not a {kind}'s ({reason})") from error


def _refuse_windows(config: PreTrainedConfig) -> None:
    """Qwen's windows are off unless asked for, Mistral's on unless they are null."""
    types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if types:
        raise ValueError(
            f"config.json has layer_types {', '.join(sorted(types))}; the Transformer only "
            "attends in full"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"config.json has sliding_window = {window} and max_position_embeddings = "
            f"{config.max_position_embeddings}, but the Transformer only attends in full; in rows "
            f"of at most {window} tokens that is the same: set max_position_embeddings to {window}"
        )
