"""Choose the positions of a row that a denoising step computes; the others are read from a cache.

Under bidirectional attention every state depends on every token, so that a cached state is a little
out of date: a cache trades accuracy for time, and `refresh` says how often everything is computed
again. With `refresh` 1 that is each step, and the result is that without a cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.core.blocks import block_runs
from mmdlm.core.sampling.unmasking import Progress, highest
from mmdlm.core.sequence import Batch


@dataclass(frozen=True)
class CacheState:
    """How far each row has come before a denoising step.

    Attributes:
        progress: Of each row in its current block.
        batch: The rows as they were given.
        in_block: [B, L] bool, targets of the current blocks.
        in_later_blocks: [B, L] bool, targets of the blocks to come.
        committed: [B, L] bool.
        just_committed: [B, L] bool, committed in the step before.
        confidence: [B, L] probability of the token that was drawn in the step before; 0 if none
            was.
    """

    progress: Progress
    batch: Batch
    in_block: Tensor
    in_later_blocks: Tensor
    committed: Tensor
    just_committed: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Cache(ABC):
    """Choose what is computed again; the first step of a block computes the whole row.

    Context, such as a prompt, is computed only with the whole row, except by `Prompt`.

    Attributes:
        refresh: Every so many steps from there on the whole row is computed; None: never again.
        grows: Whether what lies behind the last computed token is left out of forward passes, so
            that the cache grows with the text.
    """

    grows: ClassVar[bool] = False

    refresh: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.refresh is not None and self.refresh < 1:
            raise ValueError(f"cache: refresh must be at least 1, got {self.refresh}")

    def check(self, batch: Batch) -> None:
        """Raise ValueError for a batch that the cache cannot serve; most serve any."""
        return

    def compute_mask(self, state: CacheState) -> Tensor:
        """Return what is computed again, [B, L] bool; a row that is all true is computed whole."""
        return self.recompute_mask(state) | self.refresh_rows(state)[:, None]

    def refresh_rows(self, state: CacheState) -> Tensor:
        """Return the rows that are computed whole, [B] bool."""
        step = state.progress.step
        return step == 0 if self.refresh is None else step % self.refresh == 0

    @abstractmethod
    def recompute_mask(self, state: CacheState) -> Tensor:
        """Return what is computed again in any other step, [B, L] bool."""


@dataclass(frozen=True)
class Prompt(Cache):
    """Keep only the prompt, from the first step to the last.

    Exact for a model whose prompt attends only to itself (`prefix_attention`), as LaViDa's does.

    Source: arXiv:2505.16839 (LaViDa's prefix mask).
    """

    def refresh_rows(self, state: CacheState) -> Tensor:
        """Return the rows that are computed whole, see `Cache.refresh_rows`."""
        begins = ~state.committed.any(1) & (state.progress.step == 0)
        return begins if self.refresh is None else begins | super().refresh_rows(state)

    def recompute_mask(self, state: CacheState) -> Tensor:
        """Return what is computed again, see `Cache.recompute_mask`."""
        return ~state.batch.prefix


@dataclass(frozen=True)
class Prefix(Cache):
    """Keep what lies before the block: the prompt and the blocks that are finished.

    Source: arXiv:2505.22618 (Fast-dLLM).
    Departures: There what stands behind the last target is computed as well.
    """

    def recompute_mask(self, state: CacheState) -> Tensor:
        """Return what is computed again, see `Cache.recompute_mask`."""
        return state.in_block | state.in_later_blocks


@dataclass(frozen=True)
class Dual(Cache):
    """Keep all but the block: what lies before it, and the open blocks behind it.

    Source: arXiv:2505.22618 (Fast-dLLM's DualCache).
    """

    def recompute_mask(self, state: CacheState) -> Tensor:
        """Return what is computed again, see `Cache.recompute_mask`."""
        return state.in_block


@dataclass(frozen=True)
class Delayed(Cache):
    """Keep a token from the second step after it was committed.

    Its state changes most when the token replaces the mask, so that it is computed once more with
    the token in place. Open targets of all blocks are computed in each step.

    Source: arXiv:2505.15781 (dKV-Cache-Decode, refreshed every 8 steps).
    """

    refresh: int | None = 8

    def recompute_mask(self, state: CacheState) -> Tensor:
        """Return what is computed again, see `Cache.recompute_mask`."""
        return (state.in_block | state.in_later_blocks) & ~state.committed | state.just_committed


@dataclass(frozen=True)
class Stable(Cache):
    """Keep what the model is sure of: made for images, whose codes are all open at once.

    The first steps of a block compute the whole row, then every step of the number `refresh`. The
    others compute the open targets that the model is least sure of, and tokens that were committed
    in the step before.

    Source: arXiv:2510.06308 (Lumina-DiMOO's ML-Cache).
    Departures: There the largest logit says what is sure, here the probability of the drawn token.

    Attributes:
        refresh: As in `Cache`.
        warm_up: Share of the steps of a block that compute the whole row, in [0, 1].
        share: Share of the open targets that are computed, in [0, 1].
    """

    refresh: int | None = 5
    warm_up: float = 0.3
    share: float = 0.1

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        for name in ("warm_up", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"cache: {name} must lie in [0, 1], got {getattr(self, name)}")

    def refresh_rows(self, state: CacheState) -> Tensor:
        """Return the rows that are computed whole, see `Cache.refresh_rows`."""
        progress = state.progress
        return super().refresh_rows(state) | (progress.step < self.warm_up * progress.steps)

    def recompute_mask(self, state: CacheState) -> Tensor:
        """Return what is computed again, see `Cache.recompute_mask`."""
        open_ = state.in_block & ~state.committed
        count = torch.ceil(self.share * open_.sum(1)).long()
        return highest(-state.confidence.double(), open_, count) | state.just_committed


@dataclass(frozen=True)
class FinishedBlocks(Cache):
    """Keep the blocks that are finished, and compute only the current one: exact, and growing.

    For a model in whose attention a token sees no later block (`Batch.block`). The first step of a
    block also computes the block before it, whose last tokens have just been committed. What lies
    behind the current blocks of all rows takes no part in forward passes.

    Source: arXiv:2503.09573, section 3.2 (keys and values of finished blocks).
    Departures: There, and in SDAR, a finished block has a forward pass of its own.
    """

    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a refresh, which would change nothing."""
        if self.refresh is not None:
            raise ValueError(
                f"cache: FinishedBlocks is exact, so that refresh {self.refresh} would only cost "
                "time; leave it out"
            )

    def check(self, batch: Batch) -> None:
        """Raise ValueError unless the batch is cut into blocks."""
        if batch.block is None:
            raise ValueError(
                "cache: FinishedBlocks keeps blocks that see no later ones, but this batch is not "
                "cut into blocks; use it with a model of block diffusion"
            )

    def refresh_rows(self, state: CacheState) -> Tensor:
        """Return the rows that are computed whole, see `Cache.refresh_rows`: none."""
        return torch.zeros_like(state.progress.step, dtype=torch.bool)

    def recompute_mask(self, state: CacheState) -> Tensor:
        """Return what is computed again, see `Cache.recompute_mask`.

        All from the first block that has changed or may change to the last of them, and in the
        first step all from the start of the row.
        """
        run, length = block_runs(state.batch), state.committed.shape[1]
        some = state.in_block | state.just_committed
        first = run.masked_fill(~some, length).amin(1, keepdim=True)
        first = first.masked_fill(~state.committed.any(1, keepdim=True), 0)
        last = run.masked_fill(~state.in_block, -1).amax(1, keepdim=True)
        return (run >= first) & (run <= last)
