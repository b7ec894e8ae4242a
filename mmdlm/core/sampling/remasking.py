"""Mask committed tokens again, so that a sampler can correct what it has written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmdlm.core.sampling.generators import RowGenerators
from mmdlm.core.sampling.order import gumbel_like
from mmdlm.core.sampling.unmasking import Progress, highest


@dataclass(frozen=True)
class Remasking:
    """Make committed tokens of the current block noise again, with probability sigma.

    More tokens are committed in return, so that the number of open targets still follows the
    unmasking rule; that caps sigma at sigma_max = min(1, (1 - alpha_s) / alpha_t).

    With more steps than tokens use `ScheduledTransfer`, which leaves room to the end.

    Source: arXiv:2503.00307, section 4.1.
    Departures: Counts are rounded at random; the paper draws each token on its own.

    Attributes:
        eta: Strength, in [0, 1].
        rule: "cap": sigma = min(eta, sigma_max); "rescale": sigma = eta * sigma_max.
        by_confidence: Choose tokens by softmax(-probability at which they were committed), not
            uniformly.
        between: Times (1 at the start of a block, 0 at its end) between which it happens.
    """

    eta: float
    rule: Literal["cap", "rescale"] = "cap"
    by_confidence: bool = False
    between: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 <= self.eta <= 1:
            raise ValueError(f"Remasking: eta must lie in [0, 1], got {self.eta}")

    def choose_in_rows(
        self,
        committed: Tensor,
        probability: Tensor,
        *,
        remaining: Tensor,
        progress: Progress,
        generators: RowGenerators,
    ) -> Tensor:
        """Choose as `choose` does, each row with its own generator if it has one."""
        again = torch.zeros_like(committed)
        for rows, generator in generators.spans():
            again[rows] = self.choose(
                committed[rows],
                probability[rows],
                remaining=remaining[rows[0]],
                progress=progress.rows(rows[0]),
                generator=generator,
            )
        return again

    def choose(
        self,
        committed: Tensor,
        probability: Tensor,
        *,
        remaining: Tensor,
        progress: Progress,
        generator: torch.Generator,
    ) -> Tensor:
        """Choose the committed tokens that become noise again.

        Args:
            committed: [B, L] bool, committed tokens of the current blocks.
            probability: [B, L] of each of them when it was committed.
            remaining: [B] targets that stay open by plan; the most that a row takes back.
            progress: Of each row in its block.
            generator: Draws numbers and tokens.

        Returns:
            [B, L] bool.
        """
        number = committed.sum(1)
        sigma_max = (remaining / number.clamp_min(1)).clamp_max(1.0)
        sigma = self.eta * sigma_max if self.rule == "rescale" else sigma_max.clamp_max(self.eta)
        t = 1 - progress.step / progress.steps
        sigma = sigma * ((t >= self.between[0]) & (t <= self.between[1]))
        u = torch.rand(sigma.shape, generator=generator, device=sigma.device)
        count = torch.minimum((sigma * number + u).floor().long(), remaining)
        score = gumbel_like(probability.double(), generator)
        return highest(score - probability if self.by_confidence else score, committed, count)
