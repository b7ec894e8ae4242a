"""Unmasking rules of block diffusion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.sampling.unmasking import Progress, UnmaskingRule


@dataclass(frozen=True)
class BlockTransfer(UnmaskingRule):
    """Commit in each step what `UniformTransfer` would in a block of this length.

    A block that begins with a part of the prompt has fewer targets; the counts stay those of a
    whole block, so that it takes fewer steps.

    Source: published code of SDAR (arXiv:2510.06303) and LLaDA2.0.

    Attributes:
        block_length: Tokens of a whole block.
    """

    block_length: int

    def __post_init__(self) -> None:
        """Check the value."""
        if self.block_length < 1:
            raise ValueError(
                f"BlockTransfer: block_length must be at least 1, got {self.block_length}"
            )

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        """Return how many targets stay open, see `UnmaskingRule.remaining`."""
        each, rest = self.block_length // progress.steps, self.block_length % progress.steps
        return (progress.open - each - (progress.step < rest).long()).clamp_min(0)
