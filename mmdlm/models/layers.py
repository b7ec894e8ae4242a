"""The layers of the Transformer: norm, rotary positions, attention and SwiGLU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mmdlm.core.kernels.linear import Linear, products
from mmdlm.models.attention import AttentionPattern, attend
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.rope import rope_type
from mmdlm.models.token_subset import TokenSubset

Rotation = tuple[Tensor, Tensor]  # cosine and sine, as `rotate` wants them
# Keys and values [B, H, A, d] of the tokens that are computed -> [B, H, L, d] of the whole row.
KeyValue = tuple[Tensor, Tensor]
KeyValueHook = Callable[[Tensor, Tensor], KeyValue]


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, under a name that transformers initializes to ones."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x; a scale in the dtype of `x` keeps the fused kernel under autocast."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class RotaryEmbedding(nn.Module):
    """Rotates pairs of channels by an angle that grows with the position.

    Source: arXiv:2104.09864, section 3.2; halves instead of neighbors are paired, as Llama does.
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
    """Return the type of the scaling, and a config that transformers' functions read."""
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
    """Take the rotation [B, 1, L, d] of a row at a subset of tokens: [B, 1, A, d]."""
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
        """Attend, [B, L, D] -> [B, L, D].

        Args:
            x: [B, L, D], normalized hidden states.
            rotation: Cosine and sine of the tokens' positions.
            pattern: Which tokens see which.
            key_value_hook: Told the keys and values of these tokens, and gives those of the whole
                row.
            local_window: The row [B, L, D] that A tokens [B, A, D] see, and its rotation; None:
                themselves.

        Returns:
            [B, L, D], before the residual is added.
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
        """Apply a layer, [B, L, D] -> [B, L, D].

        Args:
            x: [B, L, D], hidden states.
            rotation: Cosine and sine of the tokens' positions.
            pattern: Which tokens see which.
            key_value_hook: As in `Attention`.
            subset: Those of the row that are computed, [B, A, D], all of it bearing on them;
                `pattern` says what they see.

        Returns:
            [B, L, D], or [B, A, D] for a subset.
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
