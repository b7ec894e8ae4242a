"""How many rollouts there are, what they may cost and what they are worth."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmdlm.rl.advantage import AccuracyFilter, Advantage
from mmdlm.rl.reward import Breakdown, Rubric


@dataclass(frozen=True)
class Budget:
    """What a run may cost; it ends as it would at its last step, after the step that spends it.

    Attributes:
        tokens: Scored tokens of rollouts, of all processes: as many as one has, times their number.
        seconds: Of rollouts and training, of all starts of the run together; what a kill undoes is
            not counted.
    """

    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"budget: {name} is {value}; it must be above 0, or left out")


@dataclass(frozen=True)
class RewardConfig:
    """What rollouts are worth.

    Attributes:
        rubric: Weighted rewards.
        advantage: From rewards to advantages, in groups.
        keep: Which groups have something to teach; None: all.
        right: The reward by which `keep` tells right from wrong, which lies in [0, 1]; "": the one
            that there is.
    """

    rubric: Rubric
    advantage: Advantage
    keep: AccuracyFilter | None = None
    right: str = ""

    def __post_init__(self) -> None:
        if self.right and self.right not in self.rubric.rewards:
            raise ValueError(
                f"right {self.right!r} is no reward of the rubric; it has "
                f"{', '.join(sorted(self.rubric.rewards))}"
            )
        if self.keep is not None and not self.right and len(self.rubric.rewards) > 1:
            raise ValueError(
                "keep tells right from wrong by one reward, but the rubric has "
                f"{', '.join(sorted(self.rubric.rewards))}; name one of them as right"
            )

    @property
    def judge(self) -> str:
        """The reward by which `keep` tells right from wrong."""
        return self.right or next(iter(self.rubric.rewards))

    def learned(self, rewards: Breakdown, *, group: Tensor) -> Tensor:
        """[N] bool, the rollouts that take part in the loss.

        Raises ValueError for a reward that does not tell right from wrong.
        """
        if self.keep is None:
            return rewards.scored
        right = rewards.rewards[self.judge]
        outside = (right < 0) | (right > 1)
        if bool(outside.any()):
            raise ValueError(
                f"keep: reward {self.judge!r} is {float(right[outside][0]):g}, but only one in "
                "[0, 1] tells right from wrong; name another as right, or leave keep out"
            )
        return rewards.scored & self.keep(right, group=group)


@dataclass(frozen=True)
class Plan:
    """How many of what.

    Attributes:
        prompts: Of a micro-batch.
        num_generations: Completions of each prompt.
        gradient_accumulation_steps: Micro-batches of a step, on each process.
        num_iterations: Steps of training that each set of rollouts serves.
        process: Number of this process, from 0.
        of: Number of processes.
    """

    prompts: int
    num_generations: int
    gradient_accumulation_steps: int
    num_iterations: int
    process: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        for name, least in (
            ("prompts", 1),
            ("num_generations", 2),
            ("gradient_accumulation_steps", 1),
            ("num_iterations", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
