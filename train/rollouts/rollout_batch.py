"""What a policy learns from: its rollouts, what they are worth, and how they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmdlm.core.likelihood.noisy_view import NoisyView
from mmdlm.core.likelihood.token_scores import TokenScores
from mmdlm.core.sequence import Batch
from mmdlm.rl.statistics import Statistics


@dataclass(frozen=True)
class ScoredViews:
    """The views of one inner iteration, and what others than the policy say of them.

    Attributes:
        old: Scores of the policy before its first update; None: it is the policy as it is.
        reference: Scores of the reference; None where no loss asks for them.
    """

    views: tuple[NoisyView, ...]
    old: TokenScores | None = None
    reference: TokenScores | None = None


@dataclass(frozen=True)
class RolloutBatch:
    """A micro-batch of rollouts, whole groups of them, for one inner iteration.

    Attributes:
        batch: Answers filled in; one rollout a row.
        advantage: [B], as `PolicyLoss.prepare` made it.
        statistics: To log of the rollouts.
        undrawable: Ids that the sampler could not draw.
    """

    batch: Batch
    advantage: Tensor
    scored_views: ScoredViews
    statistics: Statistics
    undrawable: tuple[int, ...] = ()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> RolloutBatch:
        """On another device; statistics stay where they are."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        moved: ScoredViews = _mapped(self.scored_views, move)
        batch = self.batch.to(device, non_blocking=non_blocking)
        return replace(self, batch=batch, advantage=move(self.advantage), scored_views=moved)


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of rollouts with what all of its inner iterations need."""

    batch: Batch
    advantage: Tensor
    scored_views: tuple[ScoredViews, ...]
    statistics: Statistics
    undrawable: tuple[int, ...] = ()

    def at(self, iteration: int) -> RolloutBatch:
        """For one inner iteration."""
        return RolloutBatch(
            self.batch,
            self.advantage,
            self.scored_views[iteration],
            self.statistics,
            self.undrawable,
        )

    def state_dict(self) -> dict[str, Any]:
        """As plain containers of tensors on the CPU, which torch loads without running code."""
        state: dict[str, Any] = _plain(self)
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> MicroBatch:
        """Return the micro-batch that `state_dict` wrote."""

        def scores(found: Mapping[str, Any] | None) -> TokenScores | None:
            return None if found is None else TokenScores(**found)

        return cls(
            batch=Batch(**state["batch"]),
            advantage=state["advantage"],
            scored_views=tuple(
                ScoredViews(
                    views=tuple(NoisyView(**view) for view in scored_views["views"]),
                    old=scores(scored_views["old"]),
                    reference=scores(scored_views["reference"]),
                )
                for scored_views in state["scored_views"]
            ),
            statistics=Statistics(**state["statistics"]),
            undrawable=tuple(state.get("undrawable", ())),
        )


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a dataclass with each tensor in it replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_mapped(one, function) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _mapped(getattr(value, f.name), function) for f in fields(value)}
        return replace(value, **changed)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    assert value is None or isinstance(value, int | float | str), type(value)
    return value
