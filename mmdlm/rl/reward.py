"""From completions to numbers: what a reward is, and the weighted sum of several."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from threading import Thread
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

Scores = Sequence[float | None]
Reward = Callable[..., Scores | Awaitable[Scores]]
"""`fn(prompts, completions, **columns) -> list[float | None]`, sync or async, as TRL calls it.

Everything is given by name: `prompts`, `completions`, `completion_ids` (a list of ids each, without
what stands behind an end), `trainer_state` (`global_step`; both are None outside of training), one
list for each column of the data set, and `log_extra(column, values)` and `log_metric(name, value)`,
with which a reward notes what it saw.
A prompt is a text or a list of messages, a completion a text, a list of messages or an image.
None says that the reward has nothing to say of that completion.
Source: TRL 1.10, "Using a custom reward function".
"""

GIVEN = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)


class RewardUnavailable(ValueError):
    """A reward cannot work here at all: a package is missing. Never counted as a skip."""


@dataclass(frozen=True)
class Skipped:
    """Scores that a reward failed to give: how many, and in one sentence why the first did."""

    count: int
    reason: str


@dataclass(frozen=True)
class Breakdown:
    """What N completions are worth, and what that is made of.

    Attributes:
        total: [N] float64, the weighted sum of the rewards that had something to say; NaN where
            none had, or where one failed: such a completion is to be left out of the update.
        rewards: name -> [N] float64, before weighing; NaN for None and for failures.
        weights: name -> weight.
        skipped: name -> failures, for rewards that had any.
        extras: column -> [N] values for the table of completions.
        metrics: name -> mean over what rewards logged under it.
    """

    total: Tensor
    rewards: Mapping[str, Tensor]
    weights: Mapping[str, float]
    skipped: Mapping[str, Skipped] = field(default_factory=dict)
    extras: Mapping[str, list[Any]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def scored(self) -> Tensor:
        """[N] bool: the completion has a total."""
        return ~self.total.isnan()


@dataclass(frozen=True)
class Rubric:
    """A weighted sum of rewards that keeps its parts.

    Attributes:
        rewards: Name in logs -> reward; in YAML a class path with `init_args`, or the import path
            of a function with TRL's signature.
        weights: name -> weight; 1 for what is not named.
        on_error: What becomes of a reward that raises, returns the wrong number of scores or a
            score that is not finite: "skip" counts it in the `Breakdown` and the run goes on,
            "raise" is a ValueError that names it.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float] = field(default_factory=dict)
    on_error: Literal["skip", "raise"] = "skip"

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("the rubric has no rewards; give it at least one")
        for name, reward in self.rewards.items():
            if not callable(reward):
                raise ValueError(
                    f"reward {name!r} is {reward!r}, which cannot be called; give a function or a "
                    "class of mmdlm.rl.rewards"
                )
        unknown = sorted(set(self.weights) - set(self.rewards))
        if unknown:
            raise ValueError(
                f"weight of {unknown[0]!r}, which is no reward of the rubric; it has "
                f"{', '.join(sorted(self.rewards))}"
            )
        for name, weight in self.weights.items():
            if isinstance(weight, bool) or not math.isfinite(weight):
                raise ValueError(f"weight {weight!r} of {name!r} is not a finite number; give one")
        if self.on_error not in ("skip", "raise"):
            raise ValueError(f"on_error {self.on_error!r} is neither 'skip' nor 'raise'")

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise ValueError unless each column that a reward needs is there; ask at the start.

        Nor may a column have a name under which rewards are given something else.
        """
        for name in GIVEN:
            if name in columns:
                raise ValueError(
                    f"the data set has a column {name!r}, under which rewards are given something "
                    "else; rename it"
                )
        for name, reward in self.rewards.items():
            missing = [one for one in needs(reward) if one not in columns]
            if missing:
                had = ", ".join(sorted(columns)) or "none"
                raise ValueError(
                    f"reward {name!r} asks for the column {missing[0]!r}, which the data set does "
                    f"not have (it has {had}); rename one of them or leave the reward out"
                )

    def prepare(self) -> None:
        """Load what rewards need, where they have a method `prepare()`; to be asked at the start.

        Raises RewardUnavailable for what cannot work here, before anything is sampled for it.
        """
        for reward in self.rewards.values():
            prepare = getattr(reward, "prepare", None)
            if callable(prepare):
                prepare()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        columns: Mapping[str, Sequence[Any]] = MappingProxyType({}),
        context: Mapping[str, Any] = MappingProxyType({}),
        completion_ids: Sequence[list[int]] | None = None,
        trainer_state: Any = None,
    ) -> Breakdown:
        """Score N completions.

        Async rewards run together; the sync ones before them, one after the other.

        Args:
            prompts: Texts, or lists of messages.
            completions: Texts, lists of messages, or images.
            columns: Of the data set, [N] values each.
            context: What else rewards may ask for by name, such as `describe` (a model's
                captioning).
            completion_ids: As in `Reward`.
            trainer_state: As in `Reward`.

        Returns:
            The reward of each completion, and its parts.
        """
        count = len(completions)
        for column, values in {"prompts": prompts, **columns}.items():
            if len(values) != count:
                raise ValueError(
                    f"{count} completions but {len(values)} values of {column!r}; give one for each"
                )
        self.check_columns({*columns, *context})
        notes = _Notes(count)
        given = {
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": completion_ids,
            "trainer_state": trainer_state,
            "log_extra": notes.extra,
            "log_metric": notes.metric,
            **columns,
            **context,
        }
        found = _outcomes(
            {name: (one, _accepted(one, given)) for name, one in self.rewards.items()}
        )
        rewards: dict[str, Tensor] = {}
        skipped: dict[str, Skipped] = {}
        total = torch.zeros(count, dtype=torch.float64)
        spoken = torch.zeros(count, dtype=torch.bool)
        failed = torch.zeros(count, dtype=torch.bool)
        weights = {name: float(self.weights.get(name, 1.0)) for name in self.rewards}
        for name, outcome in found.items():
            scores, wrong, reason = _scores(name, outcome, count)
            if reason:
                if self.on_error == "raise":
                    raise ValueError(reason) from (
                        outcome if isinstance(outcome, Exception) else None
                    )
                skipped[name] = Skipped(int(wrong.sum()), reason)
            rewards[name] = scores
            has = ~scores.isnan()
            total += torch.where(has, weights[name] * scores, 0.0)
            spoken |= has
            failed |= wrong
        total[failed | ~spoken] = math.nan
        metrics = {name: sum(v) / len(v) for name, v in notes.metrics.items()}
        return Breakdown(total, rewards, weights, skipped, notes.extras, metrics)


def needs(reward: Reward) -> tuple[str, ...]:
    """Return the columns that a reward needs: its parameters without a default."""
    return tuple(
        name
        for name, one in _parameters(reward).items()
        if one.default is one.empty
        and one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)
        and name not in GIVEN
    )


def text_of(completion: Any) -> str:
    """Return the text of a completion or prompt: itself, or the contents of its messages.

    Raises ValueError for what has no text, such as an image.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        completion = [completion]
    if isinstance(completion, Sequence):
        contents = [one.get("content") for one in completion if isinstance(one, Mapping)]
        texts = [one for one in contents if isinstance(one, str)]
        if len(texts) == len(completion):
            return "\n".join(texts)
    raise ValueError(
        f"a completion of type {type(completion).__name__} has no text; give this reward text or "
        "messages"
    )


# ---- calling them --------------------------------------------------------------------------------


class _Notes:
    """What rewards log while they run."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.extras: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column to the table of completions."""
        values = list(values)
        if len(values) != self.count:
            raise ValueError(
                f"{len(values)} values logged as {column!r} for {self.count} completions; log one "
                "for each"
            )
        self.extras[column] = values

    def metric(self, name: str, value: float) -> None:
        """Add a number to the logs."""
        self.metrics.setdefault(name, []).append(float(value))


def _parameters(reward: Reward) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a builtin: it says nothing of itself
        return {}


def _accepted(reward: Reward, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of what there is to give, what the reward has a parameter for; all, where it takes all."""
    parameters = _parameters(reward)
    if not parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return dict(given)
    return {name: value for name, value in given.items() if name in parameters}


Call = tuple[Reward, dict[str, Any]]


def _outcomes(calls: Mapping[str, Call]) -> dict[str, Any]:
    """Name -> what the reward returned, or the exception that it raised."""
    found: dict[str, Any] = {}
    waiting: dict[str, Awaitable[Any]] = {}
    for name, (reward, arguments) in calls.items():
        result: Any
        try:
            result = reward(**arguments)
        except RewardUnavailable:
            raise
        except (Exception, asyncio.CancelledError, SystemExit) as error:
            result = error
        found[name] = result
        if inspect.isawaitable(result):
            waiting[name] = result
    if waiting:
        found |= zip(waiting, _gathered(list(waiting.values())), strict=True)
    for outcome in found.values():
        if isinstance(outcome, RewardUnavailable):
            raise outcome
    return found


def _gathered(waiting: list[Awaitable[Any]]) -> list[Any]:
    async def gather() -> list[Any]:
        return await asyncio.gather(*waiting, return_exceptions=True)

    return asyncio.run_coroutine_threadsafe(gather(), _loop()).result()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for the life of the process: clients that rewards keep belong to the one they met.

    In a thread of its own, as the caller may be in a loop already (a notebook).
    """
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _scores(name: str, outcome: Any, count: int) -> tuple[Tensor, Tensor, str]:
    """Turn a reward's return value into [N] values (NaN: none), [N] failed, and a reason."""
    values = torch.full((count,), math.nan, dtype=torch.float64)
    every, none = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    if isinstance(outcome, BaseException):
        if not isinstance(outcome, Exception | asyncio.CancelledError | SystemExit):
            raise outcome
        what = " ".join(str(outcome).split()) or "no message"
        return values, every, f"reward {name!r} raised {type(outcome).__name__}: {what}"
    if isinstance(outcome, Tensor):
        outcome = outcome.tolist()
    if isinstance(outcome, str) or not isinstance(outcome, Sequence):
        kind = type(outcome).__name__
        return values, every, f"reward {name!r} returned {kind}; return a list of numbers"
    if len(outcome) != count:
        return (
            values,
            every,
            f"reward {name!r} returned {len(outcome)} scores for {count} completions; return one "
            "for each",
        )
    failed, reason = none, ""
    for n, score in enumerate(outcome):
        if score is None:
            continue
        try:
            number = float(score)
        except Exception:  # whatever its own __float__ raises
            number = math.nan
        if math.isfinite(number):
            values[n] = number
        else:
            failed[n] = True
            reason = reason or (
                f"reward {name!r} gave completion {n} the score {score!r}; return a finite number, "
                "or None where it does not apply"
            )
    return values, failed, reason
