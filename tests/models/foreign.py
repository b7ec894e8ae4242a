"""Tiny checkpoints of other libraries' models, with their tokenizers, in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from data_pipelines.text_tokenizer import train_text_tokenizer

TEXTS = ["red heart", "woman dark skin tone", "woman light skin tone"] * 4
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """In eval mode; no parameter is zero or one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def autoregressive(
    kind: str,
    folder: Path,
    *,
    spare: int = 5,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A random model with `spare` rows that the tokenizer has no ids for."""
    tokenizer = tokenizer or train_text_tokenizer(TEXTS, size=280)
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": len(tokenizer) + spare,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "eos_token_id": tokenizer.eos_token_id,
            **options,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = shaken(AutoModelForCausalLM.from_config(config).to(dtype))
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    return model


def encoder(kind: str, folder: Path, **options: Any) -> PreTrainedModel:
    """A random encoder with a tokenizer of words that has a mask."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += sorted({word for text in TEXTS for word in text.split()})
    words += [chr(c) for c in range(97, 123)] + [f"##{chr(c)}" for c in range(97, 123)]
    pipeline = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pipeline,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": len(tokenizer) + 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
            **options,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = shaken(AutoModelForMaskedLM.from_config(config))
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    return model
