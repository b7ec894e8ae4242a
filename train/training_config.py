"""The `training` group of every recipe: steps, optimizer, checkpoints, log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from train.optimizer import (
    AdamW,
    Cosine,
    LearningRate,
    Optimizer,
)


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how fast, and what to keep.

    Attributes:
        max_steps: Optimizer steps of the whole run.
        gradient_accumulation_steps: Batches a step, per process.
        max_grad_norm: Largest gradient norm.
        ema: Decay of the averaged weights; 0 keeps and saves none.
        mixed_precision: "no", "bf16", or "auto": bf16 on an accelerator, float32 on a CPU.
        compile: torch.compile the layers; "auto": on a GPU.
        save_steps: Steps between checkpoints (the newest `save_total_limit` stay); the last step
            has one.
        sample_steps: Steps between sample sheets; 0 for none.
        logging_steps: Steps between lines of the log.
        not_finite: What becomes of a step whose gradient is NaN or infinite: "stop" the run, or
            "skip" it, up to ten on end; the weights are moved by neither.
        trackers: Of accelerate: tensorboard, wandb, trackio.
    """

    max_steps: int = 1000
    gradient_accumulation_steps: int = 1
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: LearningRate = field(default_factory=Cosine)
    max_grad_norm: float = 1.0
    ema: float = 0.999
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    compile: Literal["auto"] | bool = "auto"
    save_steps: int = 500
    save_total_limit: int = 2
    sample_steps: int = 0
    logging_steps: int = 10
    not_finite: Literal["stop", "skip"] = "stop"
    trackers: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "gradient_accumulation_steps",
            "save_steps",
            "save_total_limit",
            "logging_steps",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value}; it must be a number, at least 1")
        for name, kind in (("optimizer", Optimizer), ("schedule", LearningRate)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} is {getattr(self, name)}; name one, or leave it out")
        for name in ("max_grad_norm", "ema"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number")
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm is {self.max_grad_norm}; it must be above 0, and .inf clips nothing"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; a decay lies in [0, 1), and 0 keeps no average")


def precision(name: str) -> str:
    """Return the precision that "auto" stands for here; any other name unchanged."""
    if name == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return name
