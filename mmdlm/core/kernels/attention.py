"""Softmax attention: torch's fused kernel, or plain products where these are faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.kernels.precision import fast_dtype

SHORT = 256  # keys; from there on torch's kernel is as fast


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what `F.scaled_dot_product_attention` does, to rounding.

    Torch's kernel for bfloat16 on a CPU is made for long rows. On one core of an AMD EPYC (Zen 5)
    forward and backward of 64 rows of 64 keys and 8 heads of 32 take 60 ms by it and 10 ms as plain
    products; 8 rows of 512 keys take 97 ms by it and 137 as products.

    Args:
        query: [B, H, L, d].
        key: [B, H_kv, K, d].
        value: [B, H_kv, K, d].
        attn_mask: [B or 1, H or 1, L, K]; a query sees the keys where it is true.
        enable_gqa: Whether each head of `key` and `value` serves several of `query`.

    Returns:
        [B, H, L, d].
    """
    if enable_gqa or not _is_short(query, key):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa
        )
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1) @ value


def _is_short(query: Tensor, key: Tensor) -> bool:
    # The size last: a compiler that sees it makes its graph depend on it.
    return (
        query.dtype == key.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and fast_dtype(query.device) == torch.bfloat16
        and key.shape[-2] <= SHORT
    )
