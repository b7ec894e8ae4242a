"""Settings that nobody can mean are one sentence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from mmdlm.cli.settings import checked
from train.optimizer import AdamW, WarmupStableDecay
from train.stages.model_shape import Shape
from train.training_config import TrainingConfig


@dataclass(frozen=True)
class Part:
    weight: float = 1.0
    batch_size: int = 4
    size: int | None = None
    names: list[Any] = field(default_factory=list)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"data": Part(weight=float("inf"))}, "data.weight is inf"),
        ({"data": Part(weight=float("nan"))}, "data.weight is nan"),
        ({"data": Part(weight=None)}, "data.weight is null"),  # type: ignore[arg-type]
        ({"data": Part(batch_size=10**12)}, "data.batch_size is 1000000000000"),
        ({"data": Part(size=10**30)}, "data.size is 1000000"),
        ({"data": Part(names=[{"a": float("-inf")}])}, "data.names.0.a is -inf"),
        ({"model": Shape(num_hidden_layers=10**8)}, "model.num_hidden_layers is 100000000"),
        ({"threads": -1}, "threads is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 1_000_000}, "threads is 1000000"),
        ({"training": TrainingConfig(max_steps=10**30)}, "training.max_steps is 1000000"),
        (
            {"training": TrainingConfig(schedule=WarmupStableDecay(decay=float("nan")))},
            "training.schedule.decay is nan",
        ),
        (
            {"training": TrainingConfig(optimizer=AdamW(learning_rate=float("inf")))},
            "training.optimizer.learning_rate is inf",
        ),
    ],
)
def test_one_that_cannot_be_meant_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        checked(settings)


def test_all_others_pass() -> None:
    settings = {
        "training": TrainingConfig(max_grad_norm=float("inf"), seed=2**62),
        "data": Part(),
        "threads": None,
        "flag": True,
    }
    assert checked(settings) == settings


@pytest.mark.parametrize(
    "name",
    [
        "max_steps",
        "gradient_accumulation_steps",
        "save_total_limit",
        "optimizer",
        "schedule",
        "max_grad_norm",
        "ema",
    ],
)
def test_nothing_in_place_of_a_setting(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is None"):
        TrainingConfig(**{name: None})
