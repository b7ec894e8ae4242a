"""The one bidirectional Transformer, as a model of the transformers library."""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from mmdlm.core.sequence import NO_DOCUMENT, Batch
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.models.attention import AttentionPattern, attend


@strict
class MmdlmConfig(PreTrainedConfig):
    """Shape of the Transformer, and the vocabulary that its ids live in.

    vocabulary             fields of `Vocabulary`
    attention_bias         bias on the query, key and value projections (Qwen2, Dream)
    qk_norm                RMSNorm on every query and key head (Qwen3)
    full_vocabulary        trained over all ids, not those of the position's modality; sampling
                           keeps to the modality all the same
    text_slots             text positions of the layout it was trained on; None: any length
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
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    full_vocabulary: bool = False
    text_slots: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
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
        super().__post_init__(**kwargs)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, under a name that transformers initialises to ones."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape; a scale in the dtype of `x` keeps the fused kernel under autocast."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class RotaryEmbedding(nn.Module):
    """Rotates pairs of channels by an angle that grows with the position.

    Source: arXiv:2104.09864, section 3.2; halves instead of neighbours are paired, as Llama does.
    """

    def __init__(self, config: MmdlmConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = int(config.head_dim or 0), config.rope_theta

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L] positions -> cosine and sine [B, 1, L, head_dim], float32."""
        # Computed here, not kept as a buffer: meta-device loading has nothing to restore.
        channel = torch.arange(0, self.head_dim, 2, device=position.device, dtype=torch.float32)
        angle = position[:, None, :, None] * self.theta ** (-channel / self.head_dim)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, H, L, d] heads -> the same heads, rotated in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; optional bias and query-key norm."""

    def __init__(self, config: MmdlmConfig) -> None:
        super().__init__()
        self.head_dim = head_dim = int(config.head_dim or 0)
        width, bias = config.hidden_size, config.attention_bias
        heads, kv_heads = config.num_attention_heads, int(config.num_key_value_heads or 0)
        self.q_proj = nn.Linear(width, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.o_proj.ends_residual_branch = True  # type: ignore[assignment]
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], pattern: AttentionPattern
    ) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        query, key, value = (
            rearrange(projection(x), "b l (h d) -> b h l d", d=self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = rotate(self.q_norm(query), *rotation)
        key = rotate(self.k_norm(key), *rotation)
        return self.o_proj(rearrange(attend(query, key, value, pattern), "b h l d -> b l (h d)"))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: arXiv:2002.05202."""

    def __init__(self, config: MmdlmConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.down_proj.ends_residual_branch = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(GradientCheckpointingLayer):
    """Pre-norm attention and SwiGLU, each around a residual."""

    def __init__(self, config: MmdlmConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], pattern: AttentionPattern
    ) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, pattern)
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

    def forward(self, embeddings: Tensor, position: Tensor, document: Tensor) -> Tensor:
        """Embeddings [B, L, D], positions and documents [B, L] -> hidden states [B, L, D]."""
        flex = self.config._attn_implementation == "flex_attention"
        pattern = AttentionPattern.of(document, flex=flex)
        rotation = self.rotary(position)
        x = embeddings
        for layer in self.layers:
            x = layer(x, rotation, pattern)
        return self.norm(x)


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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def hidden(self, x_t: Tensor, batch: Batch) -> Tensor:
        """Noisy ids [B, L] in the layout of `batch` -> [B, L, D]."""
        embeddings = self.model.embed_tokens(x_t)
        if batch.features is not None:
            slots = batch.of(Modality.FEATURE)[..., None]
            embeddings = embeddings.masked_scatter(slots, batch.features.to(embeddings.dtype))
        return self.model(embeddings, batch.position, batch.document)

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        """[B, L, D] at M marked positions [B, L] -> [M, V], or [M, stop - start] of `ids`."""
        weight = self.lm_head.weight if ids is None else self.lm_head.weight[slice(*ids)]
        return F.linear(hidden[positions], weight)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor]:
        """ids [B, L] and a mask [B, L], 0 at padding -> logits [B, L, V], as transformers has it.

        Padding, on either side, changes no other logits: positions are counted over real tokens.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        document = torch.where(attention_mask.bool(), 0, NO_DOCUMENT)
        hidden = self.model(self.model.embed_tokens(input_ids), position_ids, document)
        logits = self.lm_head(hidden)
        if return_dict is False or not (return_dict or self.config.return_dict):
            return (logits,)
        return MaskedLMOutput(logits=logits)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' `from_pretrained`, except that no tensor is ever made up.

        Raises ValueError with the names of tensors that the checkpoint lacks, has beyond the model,
        or has in another shape; transformers would draw them at random and log a warning.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they reach `info` by name
            **kwargs,
        )
        for what, keys in info.items():
            if keys and what != "error_msgs":
                names = ", ".join(sorted(str(key) for key in keys)[:5])
                raise ValueError(
                    f"checkpoint {pretrained_model_name_or_path}: {len(keys)} "
                    f"{what.replace('_', ' ')}: {names}; it does not fit its config.json"
                )
        return (model, info) if output_loading_info else model


AutoConfig.register("mmdlm", MmdlmConfig)
AutoModel.register(MmdlmConfig, MmdlmForMaskedDiffusion)
AutoModelForMaskedLM.register(MmdlmConfig, MmdlmForMaskedDiffusion)
