"""Block-wise random masks: one partly masked block, later blocks fully masked (SPG)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.diffusion.forward import exact_count
from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.noisy_view import (
    NoisyView,
    document_numbers,
    maskable,
    masked_view,
    scored_targets,
)
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class BlockRandom(LikelihoodEstimator):
    """A random block of the answer partly masked, what is behind it wholly, as a sampler has it.

    A view draws one of the answer's blocks of `block_length` targets, masks k of its m tokens,
    k ~ U{1 .. m}, and all targets behind it. What stands before it, the prompt included, is masked
    with probability `prompt_mask_prob`. All masked targets are covered, with weight n / (their
    number):
    the mean over the masked, times the n targets that are scored. The blocks of one iteration's
    views differ where there are enough. Rows hold one document.

    It is unbiased for its own mixture of noise levels, not for the bound.

    Source: arXiv:2510.09541 (SPG), its block-wise masking, and its published code, which covers the
    tokens behind the block as well, though it prepares a mask that would leave them out.
    """

    block_length: int = 32
    views: int = 2
    prompt_mask_prob: float = 0.15

    def __post_init__(self) -> None:
        self.check_counts("block_length", "views")
        self.check_probabilities("prompt_mask_prob")

    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[tuple[NoisyView, ...], ...]:
        """Draw `views` views for each iteration."""
        scored = scored_targets(batch, scored)
        block = (scored.cumsum(1) - 1) // self.block_length  # [B, L]
        number = scored.sum(1)
        blocks = ((number + self.block_length - 1) // self.block_length).clamp_min(1)  # [B]
        return tuple(
            self._views(batch, vocabulary, scored, block, blocks, generator)
            for _ in range(iterations)
        )

    def _views(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        scored: Tensor,
        block: Tensor,
        blocks: Tensor,
        generator: torch.Generator,
    ) -> tuple[NoisyView, ...]:
        device = scored.device
        key = torch.rand((len(scored), int(blocks.max())), generator=generator, device=device)
        beyond = torch.arange(key.shape[1], device=device) >= blocks[:, None]
        order = key.masked_fill(beyond, 2.0).argsort(1)  # a row's own blocks come first
        views = []
        for j in range(self.views):
            chosen_block = order.gather(1, (j % blocks)[:, None])  # [B, 1]
            u = torch.rand((len(scored), 1), generator=generator, device=device)
            share = (1 - u).expand(scored.shape)  # in (0, 1]: k is never 0
            draw, other = torch.rand((2, *scored.shape), generator=generator, device=device)
            within, _ = exact_count(
                scored & (block == chosen_block),
                share,
                draw,
                group=document_numbers(batch),
                t=share,
            )
            before = maskable(batch) & ~batch.target | scored & (block < chosen_block)
            hidden = before & (other < self.prompt_mask_prob)
            masked = within | scored & (block > chosen_block) | hidden & scored
            weight = scored.sum(1, keepdim=True) / masked.sum(1, keepdim=True).clamp_min(1)
            views.append(
                masked_view(
                    batch,
                    vocabulary,
                    masked,
                    scored,
                    weight=weight.expand(scored.shape) / self.views,
                    hidden=hidden,
                )
            )
        return tuple(views)
