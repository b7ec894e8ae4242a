"""An image cut into crops, and how the features of the crops become its slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class FeatureLayout:
    """Where the features of an image's crops stand among its slots.

    The first crop shows the whole image; its features come first, row by row. Then come those of
    the tiles, put together to one mosaic, row by row. All sizes are (rows, columns).

    Attributes:
        patches: Of one crop, as the tower sees it.
        pooled: Features of one crop, after pooling.
        tiles: After the first crop; None: the first crop is all there is.
        window: (top, bottom, left, right) of the mosaic that holds the image and not its padding.
        shrunk: Size to which the window is then resized (bilinear, in the dtype of the features).
        newline: A learned feature ends each row of the mosaic, or, without one, the first crop.
        axes: Slots have a row and a column among the positions, too (`Views.places`); for a first
            crop without newline.
    """

    patches: tuple[int, int]
    pooled: tuple[int, int]
    tiles: tuple[int, int] | None = None
    window: tuple[int, int, int, int] | None = None
    shrunk: tuple[int, int] | None = None
    newline: bool = False
    axes: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):  # JSON has only lists
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        if (self.tiles is None) != (self.window is None):
            raise ValueError(
                f"layout: tiles {self.tiles} need a window, and the reverse, not {self.window}"
            )
        if self.axes and (self.tiles is not None or self.newline):
            raise ValueError("layout: rows and columns among the positions are only for one crop")

    @property
    def crops(self) -> int:
        """Number of crops."""
        return 1 if self.tiles is None else 1 + self.tiles[0] * self.tiles[1]

    @property
    def slots(self) -> int:
        """Number of slots that the image fills."""
        first = self.pooled[0] * self.pooled[1]
        if self.window is None:
            return first + self.newline
        top, bottom, left, right = self.window
        rows, columns = self.shrunk or (bottom - top, right - left)
        return first + rows * (columns + self.newline)

    @property
    def places(self) -> Tensor | None:
        """[slots, 3] moment (there is one), row and column of each slot; None without `axes`."""
        if not self.axes:
            return None
        rows, columns = self.pooled
        moment = torch.zeros(1, dtype=torch.int64)
        return torch.cartesian_prod(moment, torch.arange(rows), torch.arange(columns))

    def arrange(self, features: Tensor, newline: Tensor | None) -> Tensor:
        """[C, rows, columns, D] pooled features, and the newline [D] -> [slots, D]."""
        first = features[0].flatten(0, 1)  # [P, D]
        ends = [newline[None].to(features.dtype)] if self.newline and newline is not None else []
        if self.tiles is None or self.window is None:
            return torch.cat([first, *ends])
        rows, columns = self.tiles
        mosaic = rearrange(features[1:], "(r c) h w d -> d (r h) (c w)", r=rows, c=columns)
        top, bottom, left, right = self.window
        mosaic = mosaic[:, top:bottom, left:right]
        if self.shrunk is not None:
            mosaic = F.interpolate(mosaic[None], self.shrunk, mode="bilinear")[0]
        mosaic = rearrange(mosaic, "d h w -> h w d")
        ends = [end.expand(len(mosaic), 1, -1) for end in ends]
        return torch.cat([first, torch.cat([mosaic, *ends], dim=1).flatten(0, 1)])

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON can hold them; `FeatureLayout(**fields)` reads them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class CropViews:
    """The `Views` (mmdlm.core) of a vision adapter.

    Attributes:
        crops: [C, 3, H, W] pixels, uint8 levels or floats that are normalized already; or [C, P,
            D_tower] features, where the tower has seen them (feature shards).
        layout: What becomes of their features.
    """

    crops: Tensor
    layout: FeatureLayout

    def __post_init__(self) -> None:
        if len(self.crops) != self.layout.crops:
            raise ValueError(
                f"views: {len(self.crops)} crops but a layout of {self.layout.crops}; make the "
                "views with the tiling of the model that looks at them"
            )

    @property
    def slots(self) -> int:
        """See `Views.slots`."""
        return self.layout.slots

    @property
    def places(self) -> Tensor | None:
        """See `Views.places`."""
        return self.layout.places

    @property
    def seen(self) -> bool:
        """Whether a tower has turned the pixels into features."""
        return self.crops.ndim == 3

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """See `Views.map`."""
        return replace(self, crops=function(self.crops))
