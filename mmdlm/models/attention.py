"""Attention patterns: who sees whom. One mask function each, the same for every kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
)
from torch.utils.checkpoint import checkpoint

from mmdlm.core.kernels.attention import attention
from mmdlm.models.token_subset import TokenSubset

_MOST_PAIRS = 4096 * 4096  # of queries and keys whose mask is made at once
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
    lookahead: Tensor | None = None,
    local_window: int | None = None,
    prefix: Tensor | None = None,
    block: Tensor | None = None,
    noisy: Tensor | None = None,
) -> MaskFunction:
    """Return `same_document`, restricted to tokens that are near enough, as tokens count.

    Args:
        document: [B, L] int64, number of each token's document, -1 at padding.
        lookahead: [B] tokens that are seen to the right: 0 is causal, None all. Turning an
            autoregressive model bidirectional, one lets it grow (arXiv:2410.17891, attention mask
            annealing).
        local_window: Tokens that are seen on either side: ModernBERT's local layers; None all.
        prefix: [B, L] tokens that see only each other, though all see them: what is computed of
            them holds whatever follows. None: there are none (arXiv:2505.16839, LaViDa's prefix
            mask).
        block: [B, L] int64, number of each token's block in its document: a token sees its own
            block and those of smaller numbers. None: there are no blocks.
        noisy: [B, L] bool, for `block`: tokens of the noisy copy of a row that stands beside its
            clean copy. Noisy tokens are seen only by those of their block, and see no clean token
            of it. None: there are none (arXiv:2503.09573, section 5.1).

    Returns:
        Whether a query sees a key, as FlexAttention asks.
    """
    functions = [same_document(document)]
    if lookahead is not None:
        functions.append(lambda b, h, q, k: k - q <= lookahead[b])
    if local_window is not None:
        functions.append(lambda b, h, q, k: (k - q).abs() <= local_window)
    if prefix is not None:
        functions.append(lambda b, h, q, k: ~prefix[b, q] | prefix[b, k])
    if block is not None:
        functions.append(_block_causal(block, noisy))
    return functions[0] if len(functions) == 1 else and_masks(*functions)


def _block_causal(block: Tensor, noisy: Tensor | None) -> MaskFunction:
    """Return the part of `visible` that `block` and `noisy` stand for."""
    if noisy is None:
        return lambda b, h, q, k: block[b, k] <= block[b, q]

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (block[b, k] == block[b, q]) & (noisy[b, k] == noisy[b, q])
        return own | ((block[b, k] < block[b, q]) & ~noisy[b, k])

    return allowed


@dataclass(frozen=True)
class WideMask:
    """A mask of too many pairs to be kept, made for some of its queries at a time.

    Attributes:
        document: As `visible` takes them, of all keys.
        lookahead: As `visible` takes them, of all keys.
        local_window: As `visible` takes them, of all keys.
        prefix: As `visible` takes them, of all keys.
        block: As `visible` takes them, of all keys.
        noisy: As `visible` takes them, of all keys.
        column: [B, A] int64, places of the queries; None: all of the row.
    """

    document: Tensor
    lookahead: Tensor | None = None
    local_window: int | None = None
    prefix: Tensor | None = None
    block: Tensor | None = None
    noisy: Tensor | None = None
    column: Tensor | None = None

    @property
    def step(self) -> int:
        """Queries whose mask is small enough."""
        return max(1, _MOST_PAIRS // self.document.numel())

    def of(self, queries: slice) -> Tensor:
        """[B, 1, A, L] bool, of some queries; true where they see a key."""
        allowed = visible(
            self.document,
            lookahead=self.lookahead,
            local_window=self.local_window,
            prefix=self.prefix,
            block=self.block,
            noisy=self.noisy,
        )
        rows, length = self.document.shape
        key = torch.arange(length, device=self.document.device)
        row = torch.arange(rows, device=self.document.device)[:, None, None, None]
        query = key[queries, None]
        if self.column is not None:
            query = self.column[:, None, queries, None]
        return allowed(row, row, query, key)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> WideMask:
        """Return the mask on another device."""
        moved = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)  # type: ignore[arg-type]

    def kept(self) -> AttentionPattern:
        """Return the pattern of all queries, unless it has too many pairs to be kept."""
        queries = self.document.shape[1] if self.column is None else self.column.shape[1]
        if queries * self.document.shape[1] > _MOST_PAIRS:
            return AttentionPattern(wide=self)
        return AttentionPattern(dense=self.of(slice(None)))


@dataclass(frozen=True)
class AttentionPattern:
    """A mask function in the form that the kernel wants; all None: everybody sees everybody.

    Attributes:
        dense: [B, 1, L, L] bool, True where attention is allowed (SDPA).
        block: torch's BlockMask (FlexAttention).
        wide: The same as dense, where it would be large: above 4,096 tokens.
    """

    dense: Tensor | None = None
    block: BlockMask | None = None
    wide: WideMask | None = None

    @classmethod
    def of(
        cls,
        document: Tensor,
        *,
        flex: bool,
        lookahead: Tensor | None = None,
        local_window: int | None = None,
        prefix: Tensor | None = None,
        block: Tensor | None = None,
        noisy: Tensor | None = None,
        undivided: bool | None = None,
    ) -> AttentionPattern:
        """Return the pattern of `visible`, or the empty one if each row is one full document.

        Args:
            document: [B, L] int64, number of each token's document, -1 at padding.
            flex: Whether to build a block mask of FlexAttention instead of a dense one.
            lookahead: See `visible`.
            local_window: See `visible`.
            prefix: See `visible`.
            block: See `visible`.
            noisy: See `visible`.
            undivided: Whether that is so; None: the device is asked, which a compiler does not do.

        Returns:
            The pattern, on the device of `document`.
        """
        rows, length = document.shape
        if local_window is not None and local_window >= length - 1:
            local_window = None
        partial = any(part is not None for part in (lookahead, local_window, prefix, block))
        if not flex and not partial and _is_undivided(document, undivided):
            return cls()
        if flex:
            allowed = visible(
                document,
                lookahead=lookahead,
                local_window=local_window,
                prefix=prefix,
                block=block,
                noisy=noisy,
            )
            device = str(document.device)
            create = _create_block_mask(document.is_cuda)
            return cls(block=create(allowed, rows, None, length, length, device=device))
        return WideMask(document, lookahead, local_window, prefix, block, noisy).kept()

    @classmethod
    def seen_from(
        cls,
        subset: TokenSubset,
        document: Tensor,
        *,
        lookahead: Tensor | None = None,
        prefix: Tensor | None = None,
        block: Tensor | None = None,
        noisy: Tensor | None = None,
        undivided: bool | None = None,
    ) -> AttentionPattern:
        """Return what queries at a subset of tokens see of their rows: `document` [B, L].

        No kernel has blocks for it. `undivided` as in `of`, of the rows of these places.
        """
        document = subset.rows_of(document)
        lookahead, prefix, block, noisy = (
            None if x is None else subset.rows_of(x) for x in (lookahead, prefix, block, noisy)
        )
        partial = any(part is not None for part in (lookahead, prefix, block))
        if not partial and _is_undivided(document, undivided):
            return cls()
        return WideMask(document, lookahead, None, prefix, block, noisy, subset.column).kept()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> AttentionPattern:
        """Move the pattern to a device: where layers are spread over several, each moves it."""
        return AttentionPattern(
            dense=None if self.dense is None else self.dense.to(device, non_blocking=non_blocking),
            block=None if self.block is None else self.block.to(device),
            wide=None if self.wide is None else self.wide.to(device, non_blocking=non_blocking),
        )


def _is_undivided(document: Tensor, known: bool | None) -> bool:
    """Whether every row of [B, L] is one document from end to end; false where nobody may ask."""
    if known is not None or torch.compiler.is_compiling():
        return bool(known)
    return bool((document == document[:, :1]).all())


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
    """Softmax attention: [B, H, L, d], [B, H_kv, L, d], [B, H_kv, L, d] -> [B, H, L, d]."""
    grouped = query.shape[1] != key.shape[1]
    if pattern.block is not None:
        return _flex_attention(query.is_cuda)(
            query, key, value, block_mask=pattern.block, enable_gqa=grouped
        )
    if pattern.wide is not None:
        return _attend_in_parts(query, key, value, pattern.wide)
    return attention(query, key, value, attn_mask=pattern.dense, enable_gqa=grouped)


def _attend_in_parts(query: Tensor, key: Tensor, value: Tensor, mask: WideMask) -> Tensor:
    """`attend`, some queries at a time; for a backward pass their masks are made again."""

    def some(part: Tensor, key: Tensor, value: Tensor, queries: slice) -> Tensor:
        grouped = part.shape[1] != key.shape[1]
        return attention(part, key, value, attn_mask=mask.of(queries), enable_gqa=grouped)

    parts = []
    for start in range(0, query.shape[2], mask.step):
        queries = slice(start, start + mask.step)
        given = (query[:, :, queries], key, value, queries)
        if torch.is_grad_enabled():
            parts.append(checkpoint(some, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(some(*given))
    return torch.cat(parts, dim=2)


@cache
def _flex_attention(on_gpu: bool) -> Callable[..., Tensor]:
    # Uncompiled FlexAttention materializes the scores; compiled, it is one fused kernel.
    return torch.compile(flex_attention) if on_gpu else cast(Callable[..., Tensor], flex_attention)


@cache
def _create_block_mask(on_gpu: bool) -> Callable[..., BlockMask]:
    # Uncompiled it materializes the mask of all pairs.
    return torch.compile(create_block_mask) if on_gpu else create_block_mask
