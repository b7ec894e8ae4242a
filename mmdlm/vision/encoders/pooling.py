"""Fewer features for a crop: its grid of patches, made coarser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

MODES = ("bilinear", "average", "max")


@dataclass(frozen=True)
class Pooling:
    """Shrinks each side of a crop's grid `stride` times.

    Attributes:
        mode: "bilinear" rounds the new side up (27 patches become 14) and samples it without
            antialiasing; "average" and "max" pool whole windows and drop what is left over (27 ->
            13).

    Source: LaViDa's published code (arXiv:2505.16839, section 3.1, speaks of average pooling).
    """

    mode: Literal["bilinear", "average", "max"] = "bilinear"
    stride: int = 2

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"pooling mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        if type(self.stride) is not int or self.stride < 1:
            raise ValueError(f"pooling stride must be a whole number from 1, not {self.stride!r}")

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of patches -> rows and columns of features.

        Raises ValueError where nothing is left.
        """
        if self.mode == "bilinear":
            return math.ceil(rows / self.stride), math.ceil(columns / self.stride)
        if min(rows, columns) < self.stride:
            raise ValueError(
                f"pooling: a grid of {rows}x{columns} patches has no window of "
                f"{self.stride}x{self.stride}; lower the stride"
            )
        return rows // self.stride, columns // self.stride

    def __call__(self, features: Tensor) -> Tensor:
        """[C, rows, columns, D] -> [C, fewer rows, fewer columns, D]."""
        size = self.grid(*features.shape[1:3])
        x = rearrange(features, "c h w d -> c d h w")
        match self.mode:
            case "bilinear":
                x = F.interpolate(x, size, mode="bilinear")
            case "average":
                x = F.avg_pool2d(x, self.stride)
            case "max":
                x = F.max_pool2d(x, self.stride)
        return rearrange(x, "c d h w -> c h w d")
