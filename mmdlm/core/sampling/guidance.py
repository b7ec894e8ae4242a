"""Guide a denoiser without a classifier: several branches, one forward pass, one set of logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.blocks import block_runs
from mmdlm.core.denoiser import Denoiser
from mmdlm.core.host_masks import numbers_of, on_host, sent
from mmdlm.core.kv_cache import KVCache
from mmdlm.core.sequence import Batch, concatenate
from mmdlm.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Guide by logits = uncond + scale * (cond - uncond).

    1 is off and costs no second branch; 0 is the unconditional model; above 1 the condition is
    exaggerated. LLaDA's and MMaDA's published scales are this scale minus 1.

    Several scales need as many unconditional batches, each without another part of the condition:
    logits = cond + sum_k (scale_k - 1) * (cond - uncond_k), the formula above for one k.

    Source: arXiv:2207.12598, equation 6 with scale = w + 1; several: published code of
    arXiv:2510.06308 (Lumina-DiMOO, editing: text 2.5 + 1, image 4 + 1).

    Attributes:
        scale: One, or several.
    """

    scale: float | tuple[float, ...] = 1.0

    @property
    def scales(self) -> tuple[float, ...]:
        """The scale of each unconditional batch."""
        return self.scale if isinstance(self.scale, tuple) else (self.scale,)

    @property
    def is_on(self) -> bool:
        """Whether any scale changes the logits."""
        return any(scale != 1.0 for scale in self.scales)

    def combine(self, cond: Tensor, unconditional: Iterator[Tensor]) -> Tensor:
        """Return guided logits, of the shape of `cond`.

        Args:
            cond: [M, V] logits under the condition; it is left as it is.
            unconditional: Logits [M, V] of each branch whose scale is not 1, one at a time, so that
                only two of them exist at once; they are left as they are.

        Returns:
            [M, V] guided logits.
        """
        first, *rest = (scale for scale in self.scales if scale != 1.0)
        without = next(unconditional)
        guided = (cond - without).mul_(first).add_(without)
        del without
        for scale, uncond in zip(rest, unconditional, strict=True):
            guided += (cond - uncond).mul_(scale - 1)
        return guided

    def __call__(
        self,
        denoiser: Denoiser,
        batch: Batch,
        *,
        unconditional: Batch | tuple[Batch, ...] | None = None,
    ) -> Denoiser:
        """Return the denoiser of `batch` under guidance.

        Args:
            denoiser: To guide.
            batch: The branch under the condition.
            unconditional: The other branch, or one for each scale, with the same targets in the
                same order; the context before them may be of another length, or be a negative
                prompt. Default: `batch` without its context.

        Returns:
            A denoiser of `batch`; `denoiser` itself where no scale differs from 1.

        Raises:
            ValueError: If there are not as many branches as scales, or not as many targets.
        """
        scales = self.scales
        if not self.is_on:
            return denoiser
        if unconditional is None:
            unconditional = batch.without_context(denoiser.vocabulary)
        others = unconditional if isinstance(unconditional, tuple) else (unconditional,)
        if len(others) != len(scales):
            raise ValueError(
                f"guidance: {len(scales)} scales {scales} but {len(others)} unconditional batches; "
                "give one for each scale"
            )
        used = [other for scale, other in zip(scales, others, strict=True) if scale != 1.0]
        for other in used:
            theirs, ours = (one.host_masks.target.numpy().sum(1) for one in (other, batch))
            if theirs.tolist() != ours.tolist():
                raise ValueError(
                    "guidance: the unconditional batch must have as many targets in each row as "
                    f"the batch; it has {int(other.target.sum())} in {tuple(other.ids.shape)}, "
                    f"the batch {int(batch.target.sum())} in {tuple(batch.ids.shape)}"
                )
        return GuidedDenoiser(self, denoiser, batch, unconditional=tuple(used))


class GuidedDenoiser:
    """A denoiser of one batch; its hidden states are those of all K + 1 branches, [B, L, (K+1) D].

    A target has its own position in each branch; ids and masks are carried over from branch to
    branch in reading order.

    Args:
        guidance: Combines the logits.
        denoiser: To guide.
        batch: The branch under the condition.
        unconditional: The other branches whose scale is not 1.
    """

    def __init__(
        self,
        guidance: ClassifierFreeGuidance,
        denoiser: Denoiser,
        batch: Batch,
        *,
        unconditional: tuple[Batch, ...],
    ) -> None:
        self._guidance = guidance
        self._denoiser = denoiser
        self._batch = batch
        self._contexts = [branch.ids for branch in unconditional]
        self._branches = concatenate([batch, *unconditional])
        # Numbers of places, row * L + column, on the host and where the batch lies.
        host_masks, *others = (branch.host_masks for branch in (batch, *unconditional))
        self._context = ~host_masks.target
        self._suffix_masks = [one.suffix_mask for one in others]
        self._runs = [
            None if one.block is None else on_host(block_runs(one)) for one in unconditional
        ]
        self._targets, *self._target_indices = (
            numbers_of(one.target) for one in (host_masks, *others)
        )
        device = batch.ids.device
        self._targets_on_device = sent(self._targets, device)
        self._target_indices_on_device = [sent(indices, device) for indices in self._target_indices]

    @property
    def branches(self) -> int:
        """Batches that go through the denoiser together."""
        return len(self._contexts) + 1

    @property
    def vocabulary(self) -> Vocabulary:
        """That of the denoiser."""
        return self._denoiser.vocabulary

    def hidden(
        self,
        x_t: Tensor,
        batch: Batch,
        *,
        query_mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """Return the hidden states of all branches, whose targets hold the same noisy ids.

        Args:
            x_t: [B, L] noisy ids.
            batch: The one that it was made for.
            query_mask: [B, L] bool, positions to compute. Targets stand for themselves in each
                branch, context behind them for all such context.
            kv_cache: See `Denoiser.hidden`.

        Returns:
            [B, L, (K + 1) D].
        """
        if query_mask is None:
            query_mask = torch.ones(x_t.shape, dtype=torch.bool)
        x, branches, query_mask = self.laid_out(x_t, batch, query_mask)
        return self.side_by_side(
            self._denoiser.hidden(x, branches, query_mask=query_mask, kv_cache=kv_cache)
        )

    def laid_out(
        self, x_t: Tensor, batch: Batch, query_mask: Tensor
    ) -> tuple[Tensor, Batch, Tensor]:
        """Return what the denoiser is asked: the rows of all branches, branch after branch.

        Args:
            x_t: As in `hidden`.
            batch: As in `hidden`.
            query_mask: As in `hidden`.

        Returns:
            Ids [(K + 1) B, L], their batch, and the positions to compute.
        """
        assert batch is self._batch, "a guided denoiser belongs to the batch it was made for"
        noisy = x_t.flatten()[self._targets_on_device]
        rows = [
            context.flatten().index_put((indices,), noisy).view_as(context)
            for context, indices in zip(self._contexts, self._target_indices_on_device, strict=True)
        ]
        query_mask = on_host(query_mask)
        marked = torch.cat([query_mask, *self._query_masks(query_mask)])
        return torch.cat([x_t, *rows]), self._branches, marked

    def side_by_side(self, hidden: Tensor) -> Tensor:
        """Return states [(K + 1) B, L, D] of the branches as [B, L, (K + 1) D]."""
        return torch.cat(hidden.chunk(self.branches, dim=0), dim=-1)

    def _query_masks(self, query_mask: Tensor) -> list[Tensor]:
        """Find the positions `query_mask` in each of the other branches; on the host."""
        whole = query_mask.all(1, keepdim=True)
        others = (query_mask & self._context).any(1, keepdim=True)  # context behind a target
        return [
            _whole_blocks(marked | (others & suffix_mask) | whole, run)
            for marked, suffix_mask, run in zip(
                self._in_branches(query_mask), self._suffix_masks, self._runs, strict=True
            )
        ]

    def _in_branches(self, marked: Tensor) -> list[Tensor]:
        """Find marked targets [B, L] of the batch in each of the other branches."""
        host_masks = marked.flatten()[self._targets]
        return [
            torch.zeros(suffix_mask.numel(), dtype=torch.bool)
            .index_put((indices,), host_masks)
            .view_as(suffix_mask)
            for indices, suffix_mask in zip(self._target_indices, self._suffix_masks, strict=True)
        ]

    def head_weight(self) -> None:
        """Return None: guided logits are not linear in one state."""

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        """Return guided logits [M, V] or [M, stop - start]; `positions` [B, L] are targets."""
        first, *others = hidden.chunk(self.branches, dim=-1)
        positions = on_host(positions)
        cond = self._denoiser.logits_at(first, positions, ids=ids)
        unconditional = (
            self._denoiser.logits_at(branch, marked, ids=ids)
            for branch, marked in zip(others, self._in_branches(positions), strict=True)
        )
        return self._guidance.combine(cond, unconditional)


def _whole_blocks(marked: Tensor, run: Tensor | None) -> Tensor:
    """Mark what lies in the blocks `run` [B, L] from the first to the last marked token."""
    if run is None:
        return marked
    first = run.masked_fill(~marked, run.shape[1]).amin(1, keepdim=True)
    return (run >= first) & (run <= run.masked_fill(~marked, -1).amax(1, keepdim=True))
