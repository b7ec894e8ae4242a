"""Which places of a row a denoising step computes anew, and which it remembers.

Under bidirectional attention every state depends on every token, so that whatever is remembered
is a little out of date: a cache trades accuracy for time, and `refresh` says how often it is made
good. With `refresh` 1 all is computed in each step, and the result is that without a cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.sampling.unmasking import Progress, highest
from mmdlm.core.sequence import Batch


@dataclass(frozen=True)
class CacheState:
    """How far each row has come before a denoising step.

    progress     in its present block
    batch        all that is given
    in_block, in_later_blocks  [B, L] bool, targets of the present block, and of the blocks to come
    committed    [B, L] bool
    just_committed        [B, L] bool, committed in the step before
    confidence         [B, L] probability of the token that was drawn in the step before; 0 if none
                       was
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
    """Chooses what is computed anew; the first step of a block computes the whole row.

    refresh  so does every step of this number from there on; None: no other

    What is not a target, such as a prompt, is computed with the whole row alone, but for `Prompt`.
    """

    refresh: int | None = None

    def __post_init__(self) -> None:
        if self.refresh is not None and self.refresh < 1:
            raise ValueError(f"cache: refresh must be at least 1, got {self.refresh}")

    def compute_mask(self, state: CacheState) -> Tensor:
        """[B, L] bool, what is computed anew; true all along a row for the whole of it."""
        return self.recompute_mask(state) | self.refresh_rows(state)[:, None]

    def refresh_rows(self, state: CacheState) -> Tensor:
        """[B] bool, the rows that are computed as a whole."""
        step = state.progress.step
        return step == 0 if self.refresh is None else step % self.refresh == 0

    @abstractmethod
    def recompute_mask(self, state: CacheState) -> Tensor:
        """[B, L] bool, what is computed anew in any other step."""


@dataclass(frozen=True)
class Prompt(Cache):
    """Remembers the prompt alone, from the first step to the last.

    Exact for a model whose prompt sees itself alone (`prefix_attention`), as LaViDa's does.
    Source: arXiv:2505.16839 (LaViDa's prefix mask).
    """

    def refresh_rows(self, state: CacheState) -> Tensor:
        begins = ~state.committed.any(1) & (state.progress.step == 0)
        return begins if self.refresh is None else begins | super().refresh_rows(state)

    def recompute_mask(self, state: CacheState) -> Tensor:
        return ~state.batch.prefix


@dataclass(frozen=True)
class Prefix(Cache):
    """Remembers what lies before the block: the prompt and the blocks that are finished.

    Source: arXiv:2505.22618 (Fast-dLLM). There what stands behind the last target is computed as
    well.
    """

    def recompute_mask(self, state: CacheState) -> Tensor:
        return state.in_block | state.in_later_blocks


@dataclass(frozen=True)
class Dual(Cache):
    """Remembers all but the block: what lies before it, and the open blocks behind it.

    Source: arXiv:2505.22618 (Fast-dLLM's DualCache).
    """

    def recompute_mask(self, state: CacheState) -> Tensor:
        return state.in_block


@dataclass(frozen=True)
class Delayed(Cache):
    """Remembers a token from the second step after it was committed.

    Its state changes most when the mask gives way to it, so that it is computed once more with
    the token in place. Open targets of all blocks are computed in each step.
    Source: arXiv:2505.15781 (dKV-Cache-Decode, refreshed every 8 steps).
    """

    refresh: int | None = 8

    def recompute_mask(self, state: CacheState) -> Tensor:
        return (state.in_block | state.in_later_blocks) & ~state.committed | state.just_committed


@dataclass(frozen=True)
class Stable(Cache):
    """Remembers what is sure: made for images, whose codes are all open at once.

    The first `warm_up` of the steps of a block compute the whole row, then every step of the number
    `refresh`. The others compute the least sure `share` of the open targets, and tokens that were
    committed in the step before.

    Source: arXiv:2510.06308 (Lumina-DiMOO's ML-Cache). There the largest logit says what is sure,
    here the probability of the token that was drawn.
    """

    refresh: int | None = 5
    warm_up: float = 0.3
    share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warm_up", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"cache: {name} must lie in [0, 1], got {getattr(self, name)}")

    def refresh_rows(self, state: CacheState) -> Tensor:
        progress = state.progress
        return super().refresh_rows(state) | (progress.step < self.warm_up * progress.steps)

    def recompute_mask(self, state: CacheState) -> Tensor:
        open_ = state.in_block & ~state.committed
        count = torch.ceil(self.share * open_.sum(1)).long()
        return highest(-state.confidence.double(), open_, count) | state.just_committed
