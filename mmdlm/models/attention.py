"""Attention patterns: who sees whom. One mask function each, the same for every kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
)

from mmdlm.models.places import Places

# (batch, head, query, key) indices -> bool; torch's `mask_mod`
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def same_document(document: Tensor) -> MaskFunction:
    """Bidirectional within each document of a packed row: document [B, L], -1 at padding.

    Padding sees only padding, so that no row of the softmax is empty and no real token sees it.
    """

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return document[b, q] == document[b, k]

    return allowed


def visible(
    document: Tensor,
    *,
    ahead: Tensor | None = None,
    around: int | None = None,
    prefix: Tensor | None = None,
) -> MaskFunction:
    """`same_document`, and of it what lies near enough; distances are counted in tokens.

    ahead   [B] tokens that are seen to the right: 0 is causal, None all. Turning an autoregressive
            model bidirectional, one lets it grow (arXiv:2410.17891, attention mask annealing)
    around  tokens that are seen on either side: ModernBERT's local layers; None all
    prefix  [B, L] tokens that see each other alone, though all see them: what is computed of them
            holds whatever follows. None: there are none (arXiv:2505.16839, LaViDa's prefix mask)
    """
    functions = [same_document(document)]
    if ahead is not None:
        functions.append(lambda b, h, q, k: k - q <= ahead[b])
    if around is not None:
        functions.append(lambda b, h, q, k: (k - q).abs() <= around)
    if prefix is not None:
        functions.append(lambda b, h, q, k: ~prefix[b, q] | prefix[b, k])
    return functions[0] if len(functions) == 1 else and_masks(*functions)


@dataclass(frozen=True)
class AttentionPattern:
    """A mask function in the form that the kernel wants; both None: everybody sees everybody.

    dense  [B, 1, L, L] bool, True where attention is allowed (SDPA)
    block  torch's BlockMask (FlexAttention)
    """

    dense: Tensor | None = None
    block: BlockMask | None = None

    @classmethod
    def of(
        cls,
        document: Tensor,
        *,
        flex: bool,
        ahead: Tensor | None = None,
        around: int | None = None,
        prefix: Tensor | None = None,
    ) -> AttentionPattern:
        """The pattern of `visible`, or the empty one where every row is one full document."""
        rows, length = document.shape
        if around is not None and around >= length - 1:
            around = None
        partial = any(part is not None for part in (ahead, around, prefix))
        if not flex and not partial and bool((document == document[:, :1]).all()):
            return cls()
        allowed = visible(document, ahead=ahead, around=around, prefix=prefix)
        if flex:
            device = str(document.device)
            create = _create_block_mask(document.is_cuda)
            return cls(block=create(allowed, rows, None, length, length, device=device))
        index = torch.arange(length, device=document.device)
        row = torch.arange(rows, device=document.device)[:, None, None, None]
        return cls(dense=allowed(row, row, index[:, None], index))  # [B, 1, L, L]

    @classmethod
    def seen_from(
        cls,
        places: Places,
        document: Tensor,
        *,
        ahead: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> AttentionPattern:
        """What the queries at some places see of the keys of their rows: `document` [B, L] of all.

        Dense for every kernel, as such queries are few.
        """
        document = places.rows_of(document)
        ahead, prefix = (None if x is None else places.rows_of(x) for x in (ahead, prefix))
        if ahead is None and prefix is None and bool((document == document[:, :1]).all()):
            return cls()
        allowed = visible(document, ahead=ahead, prefix=prefix)
        key = torch.arange(document.shape[1], device=document.device)
        query = key[:, None] if places.column is None else places.column[:, None, :, None]
        row = torch.arange(len(document), device=document.device)[:, None, None, None]
        return cls(dense=allowed(row, row, query, key))  # [R, 1, A, L]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> AttentionPattern:
        """The pattern on another device: where layers are spread over several, each moves it."""
        return AttentionPattern(
            dense=None if self.dense is None else self.dense.to(device, non_blocking=non_blocking),
            block=None if self.block is None else self.block.to(device),
        )


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
    """Softmax attention: [B, H, L, d], [B, H_kv, L, d], [B, H_kv, L, d] -> [B, H, L, d]."""
    grouped = query.shape[1] != key.shape[1]
    if pattern.block is not None:
        return _flex_attention(query.is_cuda)(
            query, key, value, block_mask=pattern.block, enable_gqa=grouped
        )
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=pattern.dense, enable_gqa=grouped
    )


@cache
def _flex_attention(on_gpu: bool) -> Callable[..., Tensor]:
    # Uncompiled FlexAttention materialises the scores; compiled, it is one fused kernel.
    return torch.compile(flex_attention) if on_gpu else cast(Callable[..., Tensor], flex_attention)


@cache
def _create_block_mask(on_gpu: bool) -> Callable[..., BlockMask]:
    # Uncompiled it materialises the mask of all pairs.
    return torch.compile(create_block_mask) if on_gpu else create_block_mask
