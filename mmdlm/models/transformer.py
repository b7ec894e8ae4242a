"""The body of the Transformer: embeddings to hidden states, whole, cached or of several copies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, initialization
from transformers.utils.generic import is_flash_attention_requested

from mmdlm.core.host_masks import on_host
from mmdlm.core.kv_cache import KVCache
from mmdlm.core.sequence import NO_DOCUMENT
from mmdlm.models.attention import AttentionPattern, FlashRuns
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.layers import KeyValue, Layer, RMSNorm, RotaryEmbedding, Rotation, turned
from mmdlm.models.token_subset import TokenSubset


class MmdlmPreTrainedModel(PreTrainedModel):
    """What transformers wants to know about the Transformer."""

    config_class = MmdlmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Layer"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _can_compile_fullgraph = True

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
        block: Tensor | None = None,
        noisy: Tensor | None = None,
        query_mask: Tensor | None = None,
        undivided: bool | None = None,
        pattern: AttentionPattern | None = None,
        record: list[Tensor] | None = None,
        past: Cache | None = None,
    ) -> Tensor:
        """Compute hidden states [B, L, D] from embeddings.

        Args:
            embeddings: [B, L, D].
            position: [B, L], or [B, L, A] for a model with `rope_sections`.
            document: [B, L], the document of each token.
            lookahead: [B], the tokens to its right that a token sees. None: all of its document.
            prefix: [B, L] bool, tokens that see only each other. None: there are none.
            block: [B, L], the number of each token's block, see `visible`. None: no blocks.
            noisy: [B, L] bool, noisy copies beside clean ones, see `visible`. None: no copies.
            query_mask: [B, L] bool, the positions that will be read: the last layer is computed
                only there, and states elsewhere are zero. None, or no position: everywhere.
            undivided: Whether every row is one document from end to end. None: it is found out.
            pattern: What is seen, in place of what `document`, `lookahead` and `prefix` say.
            record: Where the states that enter each layer are put, and the result. None: nowhere.
            past: Keys and values of tokens to the left, which all tokens see; those of these
                tokens are added to it.

        Returns:
            Hidden states, [B, L, D].
        """
        if pattern is None:
            seen_by = {"lookahead": lookahead, "prefix": prefix, "block": block, "noisy": noisy}
            pattern = self.pattern(document, seen_by, undivided=undivided)
        rotation = self.rotary(position)
        x = embeddings
        host_masks = None if query_mask is None else on_host(query_mask).numpy()
        if query_mask is None or host_masks is None or host_masks.all() or not host_masks.any():
            for number, layer in enumerate(self.layers):
                if record is not None:
                    record.append(x)
                hook = None if past is None else partial(past.update, layer_idx=number)
                x = layer(x, rotation, pattern, hook)
            x = self.norm(x)
            if record is not None:
                record.append(x)
            return x
        # Made before the layers: it may ask a GPU, which then has nothing to wait for.
        subset = TokenSubset.of(query_mask, device=x.device)
        seen = AttentionPattern.seen_from(
            subset,
            document,
            lookahead=lookahead,
            prefix=prefix,
            block=block,
            noisy=noisy,
            undivided=undivided,
        )
        for layer in self.layers[:-1]:
            x = layer(x, rotation, pattern)
        states = self.norm(self.layers[-1](x, rotation, seen, subset=subset))
        return subset.to(states.device).put(states.new_zeros(x.shape), states)

    def pattern(
        self,
        document: Tensor,
        seen: Mapping[str, Any],
        *,
        undivided: bool | None = None,
    ) -> AttentionPattern:
        """Return what tokens see, for the kernel that the config names.

        FlashAttention has no form for more than documents: there SDPA computes the same.

        Args:
            document: [B, L].
            seen: Further arguments of `visible`.
            undivided: See `forward`.

        Returns:
            The pattern.
        """
        kernel = self.config._attn_implementation
        if is_flash_attention_requested(self.config) and all(x is None for x in seen.values()):
            return AttentionPattern(flash=FlashRuns.of(kernel, document, undivided=undivided))
        flex = kernel == "flex_attention"
        pattern = AttentionPattern.of(document, flex=flex, **seen, undivided=undivided)
        return pattern.in_plain_operations() if kernel == "eager" else pattern

    def forward_cached(
        self,
        embeddings: Tensor,
        position: Tensor,
        document: Tensor,
        *,
        prefix: Tensor | None,
        block: Tensor | None = None,
        query_mask: Tensor | None,
        read: Tensor,
        whole: Tensor,
        kv_cache: KVCache,
    ) -> Tensor:
        """Run `forward` with a cache, in which the places `query_mask` are brought up to date.

        Args:
            embeddings: [B, L, D].
            position: [B, L], for the rotary embedding.
            document: [B, L] int64, number of each token's document, -1 at padding.
            prefix: [B, L] bool, tokens that see only each other; None: there are none.
            block: [B, L], the number of each token's block; None: there are no blocks.
            query_mask: [B, L] bool on the host, as are the other two.
            read: [B, L] bool, places that are ever read: of rows that are computed as a whole the
                last layer is computed only there.
            whole: [B] bool, rows that are one document from end to end.
            kv_cache: Keys, values and last states; it is changed.

        Returns:
            [B, L, D] hidden states, from the cache where nothing was computed.
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
            seen = AttentionPattern.seen_from(
                subset, document, prefix=prefix, block=block, undivided=undivided
            )
            subset_rotation = turned(rotation, subset)
            x = subset.take(embeddings)
            *first, last = (
                partial(_cached_layer, layer, kv_cache, number, subset)
                for number, layer in enumerate(self.layers)
            )
            for layer in first:
                x = layer(x, subset_rotation, seen)
            some = None
            if subset.column is None and (read & rows[:, None]).numpy().any():
                subset = TokenSubset.of(read, rows, device=device)
                seen = AttentionPattern.seen_from(
                    subset, document, prefix=prefix, block=block, undivided=undivided
                )
                some = replace(subset, rows=None)  # of x, which has only these rows
            x = self.norm(last(x, subset_rotation, seen, some))
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
        """Return K copies [K B, L, D] of rows that share a prefix, which is computed once.

        Args:
            embeddings: [K B, L, D].
            position: [B, L], alike for all copies.
            document: [B, L], alike for all copies.
            prefix: [B, L], alike for all copies.

        Returns:
            [K B, L, D] hidden states.
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
        subset_rotation = turned((again(rotation[0]), again(rotation[1])), subset)
        others = subset.take(others)
        for layer in self.layers:
            known: list[Tensor] = []
            first = layer(first, rotation, pattern, partial(_store, known))
            shared = [again(one) for one in known]
            others = layer(others, subset_rotation, seen, partial(_read, shared, subset))
        first, others = self.norm(first), self.norm(others)
        return torch.cat([first, subset.put(again(first), others)])


def _store(known: list[Tensor], key: Tensor, value: Tensor) -> KeyValue:
    """Store keys and values: a `KeyValueHook`."""
    known[:] = key, value
    return key, value


def _read(known: list[Tensor], subset: TokenSubset, key: Tensor, value: Tensor) -> KeyValue:
    """Return the shared keys and values with those of this subset: a `KeyValueHook`."""
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
    """Apply a layer at a subset of tokens; keys and values are cached, or read from the cache.

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
    """Update cached keys and values [B, L, H, d] at a subset of tokens: a `KeyValueHook`."""
    subset = subset.to(key.device)
    for known, new in ((keys, key), (values, value)):
        subset.put_(known, new.transpose(1, 2))
    key, value = (subset.rows_of(known).transpose(1, 2) for known in (keys, values))
    return key, value
