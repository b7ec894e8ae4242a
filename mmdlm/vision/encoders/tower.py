"""The contract of a vision tower: crops of an image to features of its patches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Layer = int | Literal["final"]


class Tower(nn.Module, ABC):
    """Crops -> features of their patches, taken behind one of its blocks.

    `select_layer` counts as transformers counts hidden states: 0 is what enters the first block, k
    what leaves the k-th, -1 what leaves the last and -2 what leaves the one before it; "final" is
    -1 behind the closing LayerNorm. Blocks behind the selected one do not run. They stay, with
    whatever else is not asked for, so that every tensor of a checkpoint has its place.

    Attributes:
        width: D_tower.
    """

    width: int

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches of a crop of that many pixels.

        Raises ValueError where the tower does not take such crops.
        """

    @abstractmethod
    def forward(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """Compute the features [P, D_tower] of normalized crops [3, H, W], in one pass."""

    @abstractmethod
    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that have no part in the features, and never get a gradient."""

    @property
    def dtype(self) -> torch.dtype:
        """What the tower computes in; quantized weights do not count."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())


def blocks_to_run(select_layer: Layer, depth: int) -> int:
    """How many blocks run for `select_layer`."""
    if select_layer == "final":
        return depth
    if type(select_layer) is not int or not -depth - 1 <= select_layer <= depth:
        raise ValueError(
            f"vision tower: select_layer must be 'final' or from {-depth - 1} to {depth}, as the "
            f"tower has {depth} blocks, not {select_layer!r}"
        )
    return select_layer if select_layer >= 0 else depth + 1 + select_layer


def check_square(height: int, width: int, size: int) -> None:
    """Raise ValueError for crops that are no squares of `size` pixels."""
    if (height, width) != (size, size):
        raise ValueError(
            f"crops of {width}x{height} pixels, but the vision tower takes {size}x{size}; cut them "
            "with the tiling of this model"
        )
