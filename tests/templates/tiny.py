"""A tokenizer of bytes with a family's special tokens at ids of its own, and a model over it."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmdlm.core.sequence import Batch, Sequence, collate
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.templates.text_codec import TextCodec

LLAMA_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SPECIALS = {
    "llada": ("<|startoftext|>", *LLAMA_HEADERS),
    "dream": ("<|im_start|>", "<|im_end|>"),
    "mmada": (
        "<|startoftext|>",
        *LLAMA_HEADERS,
        "<|soi|>",
        "<|eoi|>",
        *("<|t2i|>", "<|mmu|>", "[iPAD]", "<|r2i|>"),
    ),
    "llada_v": ("<|startoftext|>", *LLAMA_HEADERS),
    "lavida_llada": ("<|startoftext|>", *LLAMA_HEADERS, "<|reserved_token_1|>", "[S]"),
    "lavida_dream": ("<|im_start|>", "<|im_end|>"),
    "sdar": ("<|im_start|>", "<|im_end|>"),
    "fast_dllm": ("<|im_start|>", "<|im_end|>"),
    "dimple": ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    "lumina": ("<boi>", "<eoi>", "<uncondition>", "<|reserved_token_0|>", "<answer>", "</answer>"),
}
# Qwen's, with its default system message, and marks around what the assistant says.
CHATML = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\nYou are kind.<|im_end|>\n' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
MARKERS = {"mmada": ("<|soi|>", "<|eoi|>"), "lumina": ("<boi>", "<eoi>")}
CODES = 16


def byte_tokenizer(*specials: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    """One id for each byte; the end of text, the mask and `specials` behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    names = ["<|mask|>", *specials]
    fast.add_special_tokens({"additional_special_tokens": names})
    if bos is not None:
        fast.bos_token = bos
    return fast


def words_of(family: str, **options: Any) -> TextCodec:
    """Bytes, the family's special tokens, and image codes where it knows them."""
    tokenizer = byte_tokenizer(*SPECIALS[family], bos=options.pop("bos", None))
    size, markers = len(tokenizer), MARKERS.get(family)
    known = tokenizer.get_vocab()
    codes = CODES if markers else 0
    vocabulary = Vocabulary(
        size=size + codes,
        text=(0, size),
        image=(size, size + codes),
        mask_id=known["<|mask|>"],
        pad_id=tokenizer.eos_token_id,
        eos_id=tokenizer.eos_token_id,
        begin_image_id=known[markers[0]] if markers else None,
        end_image_id=known[markers[1]] if markers else None,
    )
    return TextCodec(tokenizer, vocabulary, **options)


def transformer(vocabulary: Vocabulary, **options: Any) -> MmdlmForMaskedDiffusion:
    """Random weights that say something, in float64: a larger batch turns no near-tie."""
    config = MmdlmConfig(
        vocabulary=vocabulary.to_dict(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        max_position_embeddings=4096,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MmdlmForMaskedDiffusion(config).double().eval()


class Script:
    """Writes expected ids: `of("<|eot_id|>")` is a special token, `text("hi")` its bytes."""

    def __init__(self, words: TextCodec) -> None:
        self.words, self.known = words, words.tokenizer.get_vocab()

    def of(self, *parts: str | int) -> list[int]:
        """Names of special tokens as their ids, other text as bytes, numbers as they are."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            elif part in self.known and len(part) > 1:
                ids.append(self.known[part])
            else:
                ids += self.words.tokenizer.encode(part, add_special_tokens=False)
        return ids

    @property
    def mask(self) -> int:
        return self.words.vocabulary.mask_id

    @property
    def eos(self) -> int:
        return self.words.vocabulary.eos_id


def ids_of(sequence: Sequence) -> list[int]:
    """All ids of a document."""
    return [i for segment in sequence.segments for i in segment.ids.tolist()]


def targets_of(sequence: Sequence) -> list[int]:
    """Places of its targets."""
    marks = torch.cat([segment.target for segment in sequence.segments])
    return marks.nonzero()[:, 0].tolist()


def batch_of(words: TextCodec, *sequences: Sequence) -> Batch:
    return collate(sequences, words.vocabulary)


def modality_of(sequence: Sequence) -> list[Modality]:
    return [segment.modality for segment in sequence.segments]


def codes(*ids: int) -> Tensor:
    return torch.tensor(ids)
