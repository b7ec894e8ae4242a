"""Train an image tokenizer: `python -m train.image_tokenizer --config X.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmdlm.vision.image_tokenizer import ImageTokenizer
from train.loop import Stage


@dataclass(frozen=True)
class PixelLoss:
    """Weights of the terms of the reconstruction loss, on pixels in [-1, 1].

    l1        mean absolute error
    l2        mean squared error
    gradient  mean absolute error of the differences between neighbouring pixels: edges stay sharp
    """

    l1: float = 1.0
    l2: float = 1.0
    gradient: float = 1.0

    def __call__(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] twice -> [], the mean over pictures."""
        error = reconstruction - pixels
        across, down = error.diff(dim=-1), error.diff(dim=-2)
        return (
            self.l1 * error.abs().mean()
            + self.l2 * error.square().mean()
            + self.gradient * (across.abs().mean() + down.abs().mean())
        )


class ReconstructionStage(Stage):
    """Pictures in, the same pictures out; the quantizer's own loss is added, already weighted."""

    coefficients: ClassVar = {"pixels": 1.0, "quantizer": 1.0}

    def __init__(self, tokenizer: ImageTokenizer, loss: PixelLoss) -> None:
        super().__init__()
        self.tokenizer, self.loss = tokenizer, loss

    def draw(self, batch: Tensor, *, generator: torch.Generator) -> None:
        """Nothing is random."""

    def counts(self, batch: Tensor, noise: Any) -> dict[str, Tensor]:
        """Pictures."""
        count = torch.tensor(len(batch), device=batch.device)
        return {"pixels": count, "quantizer": count}

    def forward(self, batch: Tensor, noise: Any) -> dict[str, Tensor]:
        """Pixels [N, 3, H, W] -> sums over pictures."""
        reconstruction, auxiliary = self.tokenizer.reconstruct(batch)
        loss = self.loss(reconstruction.float(), batch)
        return {"pixels": loss * len(batch), "quantizer": auxiliary * len(batch)}
