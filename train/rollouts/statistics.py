"""What is logged of rollouts, under the names of TRL."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmdlm.rl.advantage import reward_statistics
from mmdlm.rl.reward import Breakdown
from mmdlm.rl.rollout import Rollout
from mmdlm.rl.statistics import Statistics


def statistics_of(
    rollout: Rollout, rewards: Breakdown, learned: Tensor, *, group: Tensor
) -> Statistics:
    """Under TRL's names; see `logged` for what they become."""
    every = reward_statistics(rewards.total, group=group)
    every = every + Statistics.means(**{"completions/learned_ratio": (learned.double(), None)})
    for name, values in rewards.rewards.items():
        known = ~values.isnan()
        every = every + Statistics.means(
            **{
                f"rewards/{name}/mean": (values, known),
                f"rewards/{name}/std": (values.square(), known),
            }
        )
    for name in rewards.rewards:
        skipped = rewards.skipped.get(name)
        every = every + _sum(f"rewards/{name}/skipped", skipped.count if skipped else 0)
    for name, value in rewards.metrics.items():
        every = every + Statistics(sums={name: torch.tensor(value)}, counts={name: torch.tensor(1)})
    lengths = rollout.statistics()
    return every + Statistics(
        *({name: value.cpu() for name, value in part.items()} for part in lengths.parts)
    )


def _sum(name: str, value: float) -> Statistics:
    """Return a statistic that adds up."""
    return Statistics(sums={name: torch.tensor(float(value))}, counts={name: torch.tensor(1)})


def logged(statistics: Statistics) -> dict[str, float]:
    """Return what is logged: means, standard deviations, and sums of what was skipped."""
    values = statistics.values()
    for name in list(values):
        if name.startswith("rewards/") and name.endswith("/std"):
            mean = values[f"{name.removesuffix('/std')}/mean"]
            number = int(statistics.counts[name])
            spread = max(0.0, values[name] - mean**2) * number / max(1, number - 1)
            values[name] = math.sqrt(spread)
        elif name.startswith("rewards/") and name.endswith("/skipped"):
            values[name] = float(statistics.sums[name])
    return values
