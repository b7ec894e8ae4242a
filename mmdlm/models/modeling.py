"""The one bidirectional Transformer, as a model of the transformers library."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mmdlm.core.host_masks import numbers_of, on_host, sent
from mmdlm.core.kernels.linear import Linear, products
from mmdlm.core.kv_cache import KVCache
from mmdlm.core.sequence import NO_DOCUMENT, Batch, concatenate
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.models.attention import AttentionPattern, attend
from mmdlm.models.checkpoints.checkpoint import (
    Checkpoint,
    local_folder,
    refuse_strange_tensors,
    tokenizer_size,
)
from mmdlm.models.checkpoints.run_steps import open_checkpoint, parts_of
from mmdlm.models.families.auto import MODEL_TYPES, family_of, our_config
from mmdlm.models.families.base import refuse_kernels
from mmdlm.models.lora import has_adapter, save_adapter
from mmdlm.models.quantization import check_stored, offer_layers, take_back_layers
from mmdlm.models.resizing import padded, resized
from mmdlm.models.rope import check_rope_scaling, rope_type
from mmdlm.models.token_subset import TokenSubset
from mmdlm.vision.checkpoint_files import reason_of
from mmdlm.vision.encoders.adapter import VisionAdapter, VisionConfig

# Fields of a config that count something, of which there is one at least.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
Rotation = tuple[Tensor, Tensor]  # cosine and sine, as `rotate` wants them
# Keys and values [B, H, A, d] of the tokens that are computed -> [B, H, L, d] of the whole row.
KeyValue = tuple[Tensor, Tensor]
KeyValueHook = Callable[[Tensor, Tensor], KeyValue]
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Options of `from_pretrained` that put parts of the weights in different places.
SPREADING = ("distributed_config", "tp_plan", "tp_size", "offload_folder", "gguf_file")


@strict
class MmdlmConfig(PreTrainedConfig):
    """Shape of the Transformer, and the vocabulary that its ids live in.

    vocabulary             fields of `Vocabulary`
    attention_bias         bias on the query, key and value projections (Qwen2, Dream)
    qk_norm                RMSNorm on every query and key head (Qwen3)
    rope_scaling           stretched rotary positions, in the words of a Llama config.json
    rope_sections          pairs of channels of a head that turn with each axis of the position
                           (Qwen2-VL, Dimple); None: positions have one axis
    shift                  each hidden state predicts the next token, as that of an autoregressive
                           model does (Dream)
    full_vocabulary        trained over all ids, not those of the position's modality; sampling
                           keeps to the modality all the same
    prefix_attention       what stands before the first target of a document sees itself alone
    vision                 fields of `VisionConfig`, for a model that sees; None: it does not
    published              the family and the config.json that the weights were published with
    text_slots             text positions of the layout it was trained on; None: any length
    trained_tasks          what it was trained for, see `mmdlm.templates.native.Native`; None: not
                           recorded
    """

    model_type = "mmdlm"

    vocabulary: dict | None = None  # type: ignore[type-arg]
    vocab_size: int = 0  # of the vocabulary; kept because other libraries read it here
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # type: ignore[type-arg]
    rope_sections: list[int] | tuple[int, ...] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    shift: bool = False
    full_vocabulary: bool = False
    prefix_attention: bool = False
    vision: dict | None = None  # type: ignore[type-arg]
    published: dict | None = None  # type: ignore[type-arg]
    text_slots: int | None = None
    trained_tasks: list[str] | tuple[str, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if value is None and name in ("num_key_value_heads", "head_dim"):
                continue
            if type(value) is not int or not 1 <= value < 2**31:
                raise ValueError(f"{name} must be a whole number from 1, not {value!r}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.vocabulary is not None:
            self.vocab_size = self.vocabulary["size"]
        # Here and not in transformers' validators, whose errors are no ValueError.
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        if self.rope_sections is not None and sum(self.rope_sections) * 2 != self.head_dim:
            raise ValueError(
                f"rope_sections {list(self.rope_sections)} make {sum(self.rope_sections)} pairs of "
                f"channels, but head_dim {self.head_dim} has {self.head_dim // 2}"
            )
        check_rope_scaling(self.rope_scaling)
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {value!r}")
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(
                f"initializer_range must be a number from 0, not {self.initializer_range!r}"
            )
        if self.published is not None and not isinstance(self.published, dict):
            raise ValueError(f"published must be an object {{...}} or null, not {self.published!r}")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' `from_dict`; ValueError for a config.json that asks for code."""
        refuse_kernels(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' `get_config_dict`, in our fields where a published config is found."""
        content, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if content.get("model_type") in MODEL_TYPES:
            content = {**our_config(content), "model_type": MmdlmConfig.model_type}
        return content, rest


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, under a name that transformers initialises to ones."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape; a scale in the dtype of `x` keeps the fused kernel under autocast."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class RotaryEmbedding(nn.Module):
    """Rotates pairs of channels by an angle that grows with the position.

    Source: arXiv:2104.09864, section 3.2; halves instead of neighbours are paired, as Llama does.
    arXiv:2409.12191, section 2.1, for positions on several axes.
    """

    def __init__(self, config: MmdlmConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = int(config.head_dim or 0), config.rope_theta
        self.scaled = _scaled_rope(config) if config.rope_scaling else None
        self.sections = tuple(config.rope_sections or ())

    def forward(self, position: Tensor) -> Rotation:
        """[B, L] or [B, L, A] positions -> cosine and sine [B, 1, L, head_dim], float32.

        The first half of the sine has the other sign: see `rotate`.
        """
        position = self._by_channel(position)
        # Computed here, not kept as a buffer: meta-device loading has nothing to restore.
        if self.scaled is not None:
            kind, config = self.scaled
            frequency, factor = ROPE_INIT_FUNCTIONS[kind](config, position.device)
            cos, sin = _halves(position * frequency)
            return cos * factor, sin * factor
        channel = torch.arange(0, self.head_dim, 2, device=position.device, dtype=torch.float32)
        return _halves(position * self.theta ** (-channel / self.head_dim))

    def _by_channel(self, position: Tensor) -> Tensor:
        """Positions -> [B, 1, L, 1] of all channels, or [B, 1, L, head_dim / 2] of each pair."""
        if position.ndim == 2:
            return position[:, None, :, None]
        axes = position[:, None].split(1, dim=-1)  # [B, 1, L, 1] each
        return torch.cat(
            [
                axis.expand(-1, -1, -1, pairs)
                for axis, pairs in zip(axes, self.sections, strict=True)
            ],
            dim=-1,
        )


def _halves(angle: Tensor) -> Rotation:
    """Angles [..., d / 2] -> what the channels [..., d] and their partners are multiplied by."""
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _scaled_rope(config: MmdlmConfig) -> tuple[str, LlamaConfig]:
    """The type of the scaling, and a config in the form that transformers' functions read."""
    assert config.rope_scaling is not None
    kind = rope_type(config.rope_scaling)
    shape = LlamaConfig(
        hidden_size=config.num_attention_heads * int(config.head_dim or 0),
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={
            **config.rope_scaling,
            "rope_type": kind,
            "rope_theta": config.rope_theta,
        },
    )
    return kind, shape


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, H, L, d] heads -> the same heads, rotated in float32.

    Channel i turns with channel i + d / 2, which for the first half is taken away, not added: `sin`
    brings that sign, so that three kernels do.
    """
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def turned(rotation: Rotation, subset: TokenSubset) -> Rotation:
    """The rotation [B, 1, L, d] of a row -> that of some places, [B, 1, A, d]."""
    cos, sin = (subset.take(one[:, 0])[:, None] for one in rotation)
    return cos, sin


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; optional bias and query-key norm."""

    def __init__(self, config: MmdlmConfig) -> None:
        super().__init__()
        self.head_dim = head_dim = int(config.head_dim or 0)
        width, bias = config.hidden_size, config.attention_bias
        heads, kv_heads = config.num_attention_heads, int(config.num_key_value_heads or 0)
        self.q_proj = Linear(width, heads * head_dim, bias=bias)
        self.k_proj = Linear(width, kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(width, kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(heads * head_dim, width, bias=False)
        self.o_proj.ends_residual_branch = True  # type: ignore[assignment]
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        pattern: AttentionPattern,
        *,
        key_value_hook: KeyValueHook | None = None,
        local_window: tuple[Tensor, Rotation] | None = None,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D].

        key_value_hook    told the keys and values of these tokens, and gives those of the whole row
        local_window  the row [B, L, D] that A tokens [B, A, D] see, and its rotation; None:
                      themselves
        """
        if local_window is None:
            of_row = rotation
            query, key, value = products(x, self.q_proj, self.k_proj, self.v_proj)
        else:
            row, of_row = local_window
            query, (key, value) = self.q_proj(x), products(row, self.k_proj, self.v_proj)
        query = rotate(self.q_norm(self._heads(query)), *rotation)
        key = rotate(self.k_norm(self._heads(key)), *of_row)
        value = self._heads(value)
        if key_value_hook is not None:
            key, value = key_value_hook(key, value)
        return self.o_proj(attend(query, key, value, pattern).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, H d] -> [B, H, L, d]; einops would take longer than a kernel here."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: arXiv:2002.05202."""

    def __init__(self, config: MmdlmConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(width, inner, bias=False)
        self.up_proj = Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)
        self.down_proj.ends_residual_branch = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        gate, up = products(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Layer(GradientCheckpointingLayer):
    """Pre-norm attention and SwiGLU, each around a residual."""

    def __init__(self, config: MmdlmConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        pattern: AttentionPattern,
        key_value_hook: KeyValueHook | None = None,
        subset: TokenSubset | None = None,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D]; `key_value_hook` as in `Attention`.

        subset  those of the row that are computed, [B, A, D], all of it bearing on them; `pattern`
                says what they see
        """
        normed, local_window = self.input_layernorm(x), None
        if subset is not None:
            local_window = (normed, rotation)
            x, normed = subset.take(x), subset.take(normed)
            rotation = turned(rotation, subset)
        x = x + self.self_attn(
            normed, rotation, pattern, key_value_hook=key_value_hook, local_window=local_window
        )
        return x + self.mlp(self.post_attention_layernorm(x))


class MmdlmPreTrainedModel(PreTrainedModel):
    """What transformers wants to know about the Transformer."""

    config_class = MmdlmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Layer"]
    _supports_sdpa = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Residual branches start small, so that depth does not blow up the stream (GPT-2's rule).
        if getattr(module, "ends_residual_branch", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            initialization.normal_(module.weight, std=std)


class MmdlmModel(MmdlmPreTrainedModel):
    """The body: ids -> hidden states. Time is not an input (arXiv:2406.03736)."""

    def __init__(self, config: MmdlmConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        embeddings: Tensor,
        position: Tensor,
        document: Tensor,
        lookahead: Tensor | None = None,
        *,
        prefix: Tensor | None = None,
        query_mask: Tensor | None = None,
        undivided: bool | None = None,
    ) -> Tensor:
        """Embeddings [B, L, D], positions and documents [B, L] -> hidden states [B, L, D].

        position  or [B, L, A], of a model with `rope_sections`
        lookahead     [B] tokens to its right that a token sees; None: all of its document
        prefix    [B, L] bool, tokens that see each other alone; None: there are none
        query_mask        [B, L] bool, places that will be read: the last layer is computed there
                          alone, and
                  states elsewhere are zero. None, or none of them: everywhere
        undivided whether every row is one document from end to end; None: it is found out
        """
        flex = self.config._attn_implementation == "flex_attention"
        pattern = AttentionPattern.of(
            document, flex=flex, lookahead=lookahead, prefix=prefix, undivided=undivided
        )
        rotation = self.rotary(position)
        x = embeddings
        host_masks = None if query_mask is None else on_host(query_mask).numpy()
        if query_mask is None or host_masks is None or host_masks.all() or not host_masks.any():
            for layer in self.layers:
                x = layer(x, rotation, pattern)
            return self.norm(x)
        # Made before the layers: it may ask a GPU, which then has nothing to wait for.
        subset = TokenSubset.of(query_mask, device=x.device)
        seen = AttentionPattern.seen_from(
            subset, document, lookahead=lookahead, prefix=prefix, undivided=undivided
        )
        for layer in self.layers[:-1]:
            x = layer(x, rotation, pattern)
        states = self.norm(self.layers[-1](x, rotation, seen, subset=subset))
        return subset.to(states.device).put(states.new_zeros(x.shape), states)

    def forward_cached(
        self,
        embeddings: Tensor,
        position: Tensor,
        document: Tensor,
        *,
        prefix: Tensor | None,
        query_mask: Tensor | None,
        read: Tensor,
        whole: Tensor,
        kv_cache: KVCache,
    ) -> Tensor:
        """`forward` with a memory, in which the places `query_mask` are brought up to date.

        query_mask     [B, L] bool on the host, as are the other two
        read   [B, L] bool, places that are ever read: of rows that are computed as a whole the last
               layer is computed there alone
        whole  [B] bool, rows that are one document from end to end
        """
        if query_mask is None or kv_cache.hidden is None:
            query_mask = torch.ones(document.shape, dtype=torch.bool)
        rotation = self.rotary(position)
        device = embeddings.device
        everywhere = query_mask.all(1)
        for rows in (everywhere, ~everywhere):  # apart, so that the one does not wait for the other
            if not rows.numpy().any():
                continue
            undivided = bool((whole | ~rows).numpy().all())
            subset = TokenSubset.of(query_mask, rows, device=device)
            seen = AttentionPattern.seen_from(subset, document, prefix=prefix, undivided=undivided)
            here = turned(rotation, subset)
            x = subset.take(embeddings)
            *first, last = (
                partial(_cached_layer, layer, kv_cache, number, subset)
                for number, layer in enumerate(self.layers)
            )
            for layer in first:
                x = layer(x, here, seen)
            some = None
            if subset.column is None and (read & rows[:, None]).numpy().any():
                subset = TokenSubset.of(read, rows, device=device)
                seen = AttentionPattern.seen_from(
                    subset, document, prefix=prefix, undivided=undivided
                )
                some = replace(subset, rows=None)  # of x, which has these rows alone
            x = self.norm(last(x, here, seen, some))
            if kv_cache.hidden is None:
                kv_cache.hidden = x.new_zeros(*document.shape, x.shape[-1])
            subset.to(x.device).put_(kv_cache.hidden, x)
        assert kv_cache.hidden is not None
        return kv_cache.hidden

    def copies(
        self,
        embeddings: Tensor,
        position: Tensor,
        document: Tensor,
        *,
        prefix: Tensor,
    ) -> Tensor:
        """K copies [K B, L, D] of rows that share a prefix, which goes through once.

        position, document, prefix  [B, L], alike for all copies
        """
        rows, more = len(document), len(embeddings) // len(document) - 1
        first, others = embeddings[:rows], embeddings[rows:]

        def again(x: Tensor) -> Tensor:
            return x.repeat(more, *[1] * (x.ndim - 1))

        rotation = self.rotary(position)
        flex = self.config._attn_implementation == "flex_attention"
        pattern = AttentionPattern.of(document, flex=flex, prefix=prefix)
        subset = TokenSubset.of(again(~prefix & (document != NO_DOCUMENT)))
        seen = AttentionPattern.seen_from(subset, again(document), prefix=again(prefix))
        here = turned((again(rotation[0]), again(rotation[1])), subset)
        others = subset.take(others)
        for layer in self.layers:
            known: list[Tensor] = []
            first = layer(first, rotation, pattern, partial(_store, known))
            shared = [again(one) for one in known]
            others = layer(others, here, seen, partial(_read, shared, subset))
        first, others = self.norm(first), self.norm(others)
        return torch.cat([first, subset.put(again(first), others)])


def _store(known: list[Tensor], key: Tensor, value: Tensor) -> KeyValue:
    """A `KeyValueHook` that writes down what it is told."""
    known[:] = key, value
    return key, value


def _read(known: list[Tensor], subset: TokenSubset, key: Tensor, value: Tensor) -> KeyValue:
    """A `KeyValueHook` of what another copy knows, but for some places."""
    old_key, old_value = (one.transpose(1, 2) for one in known)
    key = subset.put(old_key, key.transpose(1, 2)).transpose(1, 2)
    return key, subset.put(old_value, value.transpose(1, 2)).transpose(1, 2)


def _cached_layer(
    layer: nn.Module,
    kv_cache: KVCache,
    number: int,
    subset: TokenSubset,
    x: Tensor,
    rotation: Rotation,
    pattern: AttentionPattern,
    some: TokenSubset | None = None,
) -> Tensor:
    """A layer at some places, of which keys and values are remembered, and those of others known.

    What the layer is given looks alike at every depth, so that it is compiled once.
    """
    if number < len(kv_cache.keys):
        key_value_hook = partial(_update, kv_cache.keys[number], kv_cache.values[number], subset)
        return cast(Tensor, layer(x, rotation, pattern, key_value_hook, some))
    known: list[Tensor] = []  # the first pass is over all places
    x = layer(x, rotation, pattern, partial(_store, known), some)
    # Copies: the memory of a CUDA graph is only lent, and a value may be part of a larger tensor.
    for kept, one in zip((kv_cache.keys, kv_cache.values), known, strict=True):
        kept.append(one.transpose(1, 2).clone(memory_format=torch.contiguous_format))
    return x


def _update(
    keys: Tensor, values: Tensor, subset: TokenSubset, key: Tensor, value: Tensor
) -> KeyValue:
    """A `KeyValueHook` that updates cached keys and values [B, L, H, d] at some places."""
    subset = subset.to(key.device)
    for known, new in ((keys, key), (values, value)):
        subset.put_(known, new.transpose(1, 2))
    key, value = (subset.rows_of(known).transpose(1, 2) for known in (keys, values))
    return key, value


class MmdlmForMaskedDiffusion(MmdlmPreTrainedModel):
    """A `Denoiser` (mmdlm.core) that is also a transformers model.

    `model(input_ids, attention_mask).logits` is [B, L, V]; training and sampling use `hidden` and
    `logits_at`, which run the head only where it is needed.
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MmdlmConfig) -> None:
        super().__init__(config)
        if config.vocabulary is None:
            raise ValueError("MmdlmConfig.vocabulary is empty; give it Vocabulary(...).to_dict()")
        self.vocabulary = Vocabulary(**config.vocabulary)
        self.model = MmdlmModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vision = None
        if config.vision is not None:
            self.vision = VisionAdapter(VisionConfig.from_dict(config.vision), config.hidden_size)
        self.post_init()
        offer_layers(self)

    def see(self, batch: Batch) -> Batch:
        """The batch with the features of its images, computed once, before sampling or the loss.

        Raises ValueError for images shown to a model without a vision adapter.
        """
        if batch.views is None:
            return batch
        if self.vision is None:
            raise ValueError(
                f"the batch has {len(batch.views)} images to look at, but the model has no "
                "vision adapter; take one that sees, such as LLaDA-V"
            )
        return replace(batch, features=self.vision(batch.views), views=None)

    def hidden(
        self,
        x_t: Tensor,
        batch: Batch,
        *,
        query_mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """Noisy ids [B, L] in the layout of `batch` -> [B, L, D]; see `Denoiser`.

        The last layer is computed at the places `query_mask` alone, where gradients too come from.
        """
        embeddings, host_masks = self._embedded(x_t, batch), batch.host_masks
        if query_mask is not None:
            query_mask = self._read_for(on_host(query_mask))
        layout = (self._rotary(batch), batch.document)
        prefix = batch.prefix if self.config.prefix_attention else None
        if kv_cache is None:
            undivided = bool(host_masks.whole.numpy().all())
            hidden = self.model(
                embeddings,
                *layout,
                batch.lookahead,
                prefix=prefix,
                query_mask=query_mask,
                undivided=undivided,
            )
        else:
            if batch.lookahead is not None:
                raise ValueError("memory: a batch that looks ahead a bounded way is not kept")
            hidden = self.model.forward_cached(
                embeddings,
                *layout,
                prefix=prefix,
                query_mask=query_mask,
                read=self._read_for(host_masks.target),
                whole=host_masks.whole,
                kv_cache=kv_cache,
            )
        return self._aligned(hidden, batch.position)

    def _read_for(self, subset: Tensor) -> Tensor:
        """The places of the states that are read for some places: with `shift` neighbours too."""
        return subset | subset.roll(-1, dims=1) if self.config.shift else subset

    def hidden_of_copies(self, x_t: Tensor, batch: Batch, *, query_mask: Tensor) -> Tensor:
        """K copies [K B, L] of a batch -> [K B, L, D]; see `SharingDenoiser`.

        Under `prefix_attention` what stands before the targets is computed once for all of them,
        unless layers are recomputed in the backward pass.
        """
        everything = concatenate([batch] * (len(x_t) // len(batch)))
        shared = self.config.prefix_attention and batch.lookahead is None
        if not shared or any(layer.gradient_checkpointing for layer in self.model.layers):
            return self.hidden(x_t, everything, query_mask=query_mask)
        hidden = self.model.copies(
            self._embedded(x_t, everything),
            self._rotary(batch),
            batch.document,
            prefix=batch.prefix,
        )
        return self._aligned(hidden, everything.position)

    def _embedded(self, x_t: Tensor, batch: Batch) -> Tensor:
        embeddings: Tensor = self.model.embed_tokens(x_t)
        if batch.views is not None:
            raise ValueError("the batch has images not looked at yet; call see(batch) first")
        if batch.features is None:
            return embeddings
        slots = batch.of(Modality.FEATURE)[..., None]
        return embeddings.masked_scatter(slots, batch.features.to(embeddings.dtype))

    def _rotary(self, batch: Batch) -> Tensor:
        """What the rotary embedding takes for positions: [B, L], or [B, L, A] on several axes."""
        if self.config.rope_sections is None:
            return batch.position
        if batch.axes is not None:
            return batch.axes
        if batch.features is not None:
            raise ValueError(
                "the batch has features without rows and columns, for which the positions of this "
                "model have axes; give it the views that its tiling makes of the images"
            )
        return batch.position

    def _aligned(self, hidden: Tensor, position: Tensor) -> Tensor:
        """[B, L, D] such that each state predicts the token at its own position.

        With `shift` that is its left neighbour's; the first token of a document keeps its own.
        Source: arXiv:2508.15487, section 2 (the shift of the autoregressive model is kept).
        """
        if not self.config.shift:
            return hidden
        return torch.where((position == 0)[..., None], hidden, hidden.roll(1, dims=1))

    def head_weight(self) -> Tensor | None:
        """Weights [V, D] of the linear head, or None: an adapter or a quantizer has its own."""
        return self.lm_head.weight if type(self.lm_head) is Linear else None

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        """[B, L, D] at M marked positions [B, L] -> [M, V], or [M, stop - start] of `ids`."""
        rows = hidden.flatten(0, 1)[sent(numbers_of(positions), hidden.device)]
        if type(self.lm_head) is Linear:
            return self.lm_head.rows(rows, ids or (0, self.config.vocab_size))
        logits = self.lm_head(rows)
        return logits if ids is None else logits[:, slice(*ids)]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor]:
        """ids [B, L] and a mask [B, L], 0 at padding -> logits [B, L, V], as transformers has it.

        Padding, on either side, changes no other logits: positions are counted over real tokens.
        These are the logits that the network was published with: under `shift` those at i predict
        token i + 1.
        """
        if self.config.prefix_attention:
            raise ValueError(
                "prefix_attention: what is a prefix follows from targets, which this call does not "
                "know; use hidden and logits_at"
            )
        undivided = True if attention_mask is None else None
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        document = torch.where(attention_mask.bool(), 0, NO_DOCUMENT)
        embeddings = self.model.embed_tokens(input_ids)
        hidden = self.model(embeddings, position_ids, document, undivided=undivided)
        logits = self.lm_head(hidden)
        if return_dict is False or not (return_dict or self.config.return_dict):
            return (logits,)
        return MaskedLMOutput(logits=logits)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        config: PreTrainedConfig | None = None,
        output_loading_info: bool = False,
        read: Callable[[int], None] | None = None,
        checkpoint: Checkpoint | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `from_pretrained` for our checkpoints and for those of published families.

        read        told the number of bytes that were read from the files, after each piece
        checkpoint  the folder's, where it was opened already; a step of a run is one, too

        No tensor is ever made up: raises ValueError with the names of tensors that the checkpoint
        lacks, has beyond the model, or has in another shape, before weights are read; transformers
        would draw them at random and log a warning. Memory holds the weights in the dtype that is
        asked for, and one piece of a file.
        """
        if kwargs.pop("variant", None) is not None:
            raise ValueError("variant: files of other names are not read; leave it out")
        inside = kwargs.pop("subfolder", None) or ""
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if kwargs.get(name) is not None}
        folder = local_folder(pretrained_model_name_or_path, **hub) / inside
        checkpoint = checkpoint or open_checkpoint(folder)
        config = _with_codes_behind(config or read_config(checkpoint.config), parts_of(folder))
        names = checkpoint_names(checkpoint)
        _check_depth(config, checkpoint)
        if not _is_quantized(checkpoint):
            all_names = {name: names.get(name, name) for name in checkpoint.tensors}
            wanted = cls._wanted(config, all_names.values(), *args)
            checkpoint.check_fits(wanted, names=all_names)
            if config.tie_word_embeddings:
                checkpoint.check_tied(cls._tied_weights_keys, names=all_names)
        kwargs.update(output_loading_info=True, ignore_mismatched_sizes=True)  # named in `info`
        if _is_quantized(checkpoint) or not _streams(kwargs):
            kwargs["key_mapping"] = {f"^{re.escape(key)}$": ours for key, ours in names.items()}
            model, info = super().from_pretrained(folder, *args, config=config, **kwargs)
        else:
            dtype = _dtype_of(kwargs, config) or checkpoint.dtype
            kwargs["state_dict"] = {
                names.get(name, name): tensor.to(dtype, read=read)
                for name, tensor in checkpoint.tensors.items()
            }
            model, info = super().from_pretrained(None, *args, config=config, dtype=dtype, **kwargs)
            model.name_or_path = model.config.name_or_path = str(folder)
        refuse_strange_tensors(folder, info)
        take_back_layers(model)
        return (model, info) if output_loading_info else model

    @classmethod
    def _wanted(
        cls, config: PreTrainedConfig, stored: Collection[str], *args: Any
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that a model of this config reads from a checkpoint."""
        with torch.device("meta"):
            model = cls(config, *args)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        # A tied tensor need not be stored.
        for name in model.all_tied_weights_keys:
            if name not in stored:
                shapes.pop(name, None)
        return shapes

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """transformers' `save_pretrained`, in our format wherever the weights came from.

        `mmdlm convert` writes the format of a published family; `mmdlm.Model.save_pretrained` all
        that `mmdlm.load` reads, tokenizers included. Of a model with an adapter the adapter alone
        is written, in PEFT's format.
        """
        if has_adapter(self) and not kwargs.get("push_to_hub"):
            save_adapter(self, Path(save_directory), state_dict=kwargs.get("state_dict"))
            return
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """transformers' `resize_token_embeddings`, which the vocabulary in the config follows.

        new_num_tokens  ids of text, specials and image codes together. New ones continue the text:
                        what stands behind it moves on, rows and ids

        Raises ValueError where an id that the model uses would be lost.
        """
        count = self.vocabulary.size if new_num_tokens is None else new_num_tokens
        rows = padded(count, pad_to_multiple_of)
        found = resized(self.vocabulary, count, rows=rows)
        super().resize_token_embeddings(rows, None, mean_resizing)
        head = self.lm_head
        if type(head) is nn.Linear:  # transformers has made it anew
            self.lm_head = Linear(head.in_features, head.out_features, bias=False, device="meta")
            self.lm_head.weight = head.weight
        found.arrange([self.model.embed_tokens.weight, self.lm_head.weight])
        self.vocabulary = found.vocabulary
        self.config.vocabulary = found.vocabulary.to_dict()
        return self.model.embed_tokens


def _check_depth(config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """ValueError for more layers than tensors, before they are made to be compared."""
    tower = (config.vision or {}).get("tower") or {}
    depths = (
        config.num_hidden_layers,
        *(tower.get(name) for name in ("num_hidden_layers", "depth")),
    )
    for depth in depths:
        if type(depth) is int and depth > len(checkpoint.tensors):
            raise ValueError(
                f"checkpoint {checkpoint.folder} does not fit its config.json: {depth} layers, but "
                f"{len(checkpoint.tensors)} tensors"
            )


def _is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether the weights were saved quantized; their names and shapes are the library's."""
    check_stored(checkpoint.config)
    return bool(checkpoint.config.get("quantization_config"))


def _streams(options: dict[str, Any]) -> bool:
    """Whether we read the files; where weights go to several places, transformers does."""
    if is_deepspeed_zero3_enabled() or any(options.get(name) is not None for name in SPREADING):
        return False
    if isinstance(options.get("dtype", options.get("torch_dtype")), dict):
        return False
    return isinstance(options.get("device_map"), str | int | torch.device | None) and (
        options.get("device_map") not in ("auto", "balanced", "balanced_low_0", "sequential")
    )


def _dtype_of(options: dict[str, Any], config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype that transformers' options ask for, taken from them; None: as stored."""
    older, newer = options.pop("torch_dtype", None), options.pop("dtype", None)
    dtype = newer if newer is not None else older
    if dtype in (None, "auto"):
        dtype = config.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def read_config(content: dict[str, Any], *, tokenizer_size: int | None = None) -> MmdlmConfig:
    """A config.json, ours or that of a published family -> our config.

    Raises ValueError for a family or an option that is not known here.
    """
    try:
        check_stored(content)
        if content.get("model_type") == MmdlmConfig.model_type:
            return cast(MmdlmConfig, MmdlmConfig.from_dict(content))
        return MmdlmConfig(**our_config(content, tokenizer_size=tokenizer_size))
    except (AttributeError, TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(
            f"config.json does not describe a model ({type(error).__name__}: {reason_of(error)}); "
            "mend it or download it again"
        ) from error


def _with_codes_behind(config: PreTrainedConfig, folder: Path) -> PreTrainedConfig:
    """The config with its image codes behind the tokenizer's ids, as MMaDA has them.

    `AutoConfig` sees no tokenizer. What somebody has chosen, and a model without codes, stay.
    """
    words = None if config.vocabulary is None else Vocabulary(**config.vocabulary)
    if not config.published or words is None or not words.image_codes:
        return config
    theirs = config.published["config"]
    family = family_of(theirs)
    if words != family.vocabulary(theirs) or (size := tokenizer_size(folder)) is None:
        return config
    config = copy.deepcopy(config)
    config.vocabulary = family.vocabulary(theirs, tokenizer_size=size).to_dict()
    return config


def checkpoint_names(checkpoint: Checkpoint) -> dict[str, str]:
    """The names of a published checkpoint's tensors -> ours; empty for a checkpoint of ours."""
    if checkpoint.config.get("model_type") == MmdlmConfig.model_type:
        return {}
    family = family_of(checkpoint.config, checkpoint.shapes)
    return family.weights.rename(checkpoint.shapes)


def _published(kind: str) -> type[MmdlmConfig]:
    """What `AutoConfig` asks for by a published `model_type`: it answers with our config."""

    class Published(MmdlmConfig):
        model_type = kind

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """transformers' `from_dict`; the fields are translated before it sees them."""
            return MmdlmConfig.from_dict(our_config(config_dict), **kwargs)

    return Published


AutoConfig.register("mmdlm", MmdlmConfig)
AutoModel.register(MmdlmConfig, MmdlmForMaskedDiffusion)
AutoModelForMaskedLM.register(MmdlmConfig, MmdlmForMaskedDiffusion)
for _kind in MODEL_TYPES:
    AutoConfig.register(_kind, _published(_kind))
