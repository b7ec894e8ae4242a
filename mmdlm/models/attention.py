"""Attention patterns: who sees whom. One mask function each, the same for every kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
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
from torch.utils.checkpoint import checkpoint
from transformers.modeling_flash_attention_utils import _flash_attention_forward

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
        """Return the pattern of all queries, unless it has too many pairs to be kept.

        A graph for any length has one form, in which all pairs are kept.
        """
        queries = self.document.shape[1] if self.column is None else self.column.shape[1]
        exporting = torch.compiler.is_exporting()
        if not exporting and queries * self.document.shape[1] > _MOST_PAIRS:
            return AttentionPattern(wide=self)
        return AttentionPattern(dense=self.of(slice(None)))


@dataclass(frozen=True)
class FlashRuns:
    """Runs of tokens that see each other, in the form of FlashAttention's kernels.

    Attributes:
        implementation: Transformers' name of the kernel.
        ends: [N + 1] int32, where runs end in the rows laid end to end, from 0; None: each row is
            one run.
        longest: Tokens of the longest run.
    """

    implementation: str
    ends: Tensor | None = None
    longest: int | None = None

    @classmethod
    def of(cls, implementation: str, document: Tensor, *, undivided: bool | None) -> FlashRuns:
        """Return the runs of a row's documents [B, L]; padding is a run of its own."""
        if _is_undivided(document, undivided):
            return cls(implementation)
        first = torch.ones_like(document, dtype=torch.bool)
        first[:, 1:] = document[:, 1:] != document[:, :-1]
        starts = first.flatten().nonzero()[:, 0]
        ends = F.pad(starts, (0, 1), value=document.numel()).int()
        return cls(implementation, ends, int(ends.diff().max()))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See the function `attend`."""
        parts = (x.transpose(1, 2) for x in (query, key, value))  # [B, L, H, d]
        mixed: Tensor = _flash_attention_forward(
            *parts,
            None,
            query_length=query.shape[2],
            is_causal=False,
            cu_seq_lens_q=self.ends,
            cu_seq_lens_k=self.ends,
            max_length_q=self.longest,
            max_length_k=self.longest,
            attn_implementation=self.implementation,
        )
        return mixed.transpose(1, 2)


@dataclass(frozen=True)
class AttentionPattern:
    """A mask function in the form that the kernel wants; all None: everybody sees everybody.

    Attributes:
        dense: [B, 1, L, L] bool, True where attention is allowed (SDPA); or floats that are added
            to the scores.
        block: torch's BlockMask (FlexAttention).
        wide: The same as dense, where it would be large: above 4,096 tokens.
        flash: Runs of tokens (FlashAttention).
        plain: Computed in plain operations, by no fused kernel ("eager").
        weights: Where each layer then puts its weights [B, H, L, L]; None: they are not kept.
    """

    dense: Tensor | None = None
    block: BlockMask | None = None
    wide: WideMask | None = None
    flash: FlashRuns | None = None
    plain: bool = False
    weights: list[Tensor] | None = None

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
        exporting = torch.compiler.is_exporting()  # a graph for any length
        if local_window is not None and not exporting and local_window >= length - 1:
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
    def given(cls, mask: Tensor | BlockMask, *, flex: bool) -> AttentionPattern:
        """Return the pattern of somebody's own mask.

        Args:
            mask: [B, 1, L, L] or [B, H, L, L], bool (true: seen) or floats that are added to the
                scores; or FlexAttention's own.
            flex: Whether FlexAttention is the kernel.

        Returns:
            The pattern.

        Raises:
            ValueError: For a mask that the kernel does not take.
        """
        if isinstance(mask, BlockMask):
            if not flex:
                raise ValueError(
                    "attention_mask is a BlockMask, which only attn_implementation="
                    "'flex_attention' takes; give a tensor"
                )
            return cls(block=mask)
        if not flex:
            return cls(dense=mask)
        if mask.is_floating_point():
            raise ValueError(
                "attention_mask: FlexAttention takes no floats that are added to the scores; give "
                "a bool mask, true where a token is seen"
            )
        rows, heads, queries, keys = mask.shape

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return mask[b, 0 if heads == 1 else h, q, k]

        create = _create_block_mask(mask.is_cuda)
        sizes = (rows, None if heads == 1 else heads, queries, keys)
        return cls(block=create(allowed, *sizes, device=str(mask.device)))

    def in_plain_operations(self, *, weights: list[Tensor] | None = None) -> AttentionPattern:
        """Return the same pattern without a fused kernel; `weights` as in the class."""
        dense = self.dense if self.wide is None else self.wide.of(slice(None))
        return AttentionPattern(dense=dense, plain=True, weights=weights)

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
            flash=self.flash,
            plain=self.plain,
            weights=self.weights,
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
    if pattern.flash is not None:
        return pattern.flash.attend(query, key, value)
    if pattern.plain:
        return _attend_plainly(query, key, value, pattern)
    if pattern.dense is not None and pattern.dense.is_floating_point():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=pattern.dense.to(query.dtype), enable_gqa=grouped
        )
    return attention(query, key, value, attn_mask=pattern.dense, enable_gqa=grouped)


def _attend_plainly(query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
    """`attend` in plain operations; the softmax is in float32."""
    mask, weights = pattern.dense, pattern.weights
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    shares = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if weights is not None:
        weights.append(shares)
    return shares @ value


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
