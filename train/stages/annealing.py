"""How an autoregressive model turns bidirectional while it is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.sequence import Batch


@dataclass(frozen=True)
class AttentionAnnealing:
    """From causal to bidirectional attention over the first `steps` steps of a run.

    At step s a token sees at most floor(s / steps * (n - 1)) tokens to its right, where n is the
    length of the longest document of its row; `sampled` draws their number for each row, from 0 up
    to that. From step `steps` on it sees all.

    Source: arXiv:2410.17891, section on attention mask annealing: how much is seen on the right is
    sampled, and grows. Its published code reveals single pairs of tokens instead.
    """

    steps: int = 10_000
    sampled: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"annealing: steps is {self.steps}; it must be at least 1")

    def lookahead(self, batch: Batch, step: int, *, generator: torch.Generator) -> Tensor | None:
        """[B] tokens that are seen to the right at a 0-based step; None where it is all."""
        if step >= self.steps:
            return None
        most = step / self.steps * batch.position.amax(1)  # [B]
        if self.sampled:
            draw = torch.rand(most.shape, generator=generator, device=most.device)
            return (draw * (most.floor() + 1)).floor().long()
        return most.floor().long()
