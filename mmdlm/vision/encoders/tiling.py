"""The contract of a tiling: images to the crops that a vision tower takes, and their slots.

No model is needed here: data workers cut images, and count their slots, on their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdlm.vision.encoders.crops import CropViews, FeatureLayout
from mmdlm.vision.encoders.pooling import Pooling
from mmdlm.vision.image_files import to_rgb

RESAMPLING = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True, kw_only=True)
class Tiling(ABC):
    """How images become crops.

    Attributes:
        pooling: What the adapter does to the features of each crop.
        newline: See `FeatureLayout`.
        resampling: The filter that resizes images, always with antialiasing.
    """

    kind: ClassVar[str]

    pooling: Pooling | None = None
    newline: bool = False
    resampling: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"

    def __post_init__(self) -> None:
        pooling: Any = self.pooling
        if isinstance(pooling, Mapping):
            object.__setattr__(self, "pooling", build_dataclass(Pooling, pooling, "pooling"))
        if self.resampling not in RESAMPLING:
            raise ValueError(
                f"resampling must be one of {', '.join(RESAMPLING)}, not {self.resampling!r}"
            )

    @abstractmethod
    def layout(self, width: int, height: int, *, alone: bool = True) -> FeatureLayout:
        """Return the layout of an image; `alone`: the only one of its conversation.

        Raises ValueError for an image too small or too narrow to be seen.
        """

    @abstractmethod
    def cut(self, image: Image.Image, layout: FeatureLayout) -> list[Image.Image]:
        """Cut an RGB image into its crops, in the order of the layout."""

    def views(self, images: Sequence[Image.Image]) -> list[CropViews]:
        """Cut the images of one conversation, in order, into views.

        Transparency is laid on white, and a turned photograph is set upright, before anything.
        Raises ValueError for an image too small or too narrow to be seen.
        """
        views = []
        for image in images:
            image = to_rgb(image)
            layout = self.layout(*image.size, alone=len(images) == 1)
            crops = [_levels(crop) for crop in self.cut(image, layout)]
            views.append(CropViews(torch.stack(crops), layout))
        return views

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the fields as JSON can hold them."""
        return {"kind": self.kind, **_as_json(asdict(self))}

    def _pooled(self, rows: int, columns: int) -> tuple[int, int]:
        return (rows, columns) if self.pooling is None else self.pooling.grid(rows, columns)

    def _resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        return image.resize((width, height), Image.Resampling[self.resampling.upper()])


def _levels(image: Image.Image) -> Tensor:
    """RGB image -> [3, H, W] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def covered_features(width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """Whole (rows, columns) of features that an image covers, as large as it fits into them."""
    if width / height > columns / rows:
        return int(height * (columns / width)), columns
    return rows, int(width * (rows / height))


def check_sides(**sides: int) -> None:
    """Raise ValueError for a side that is no whole number from 1."""
    for name, value in sides.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"tiling: {name} must be a whole number from 1, not {value!r}")


def check_color(value: Sequence[int]) -> tuple[int, int, int]:
    """Return a color of three levels from 0 to 255; ValueError for anything else."""
    if len(value) != 3 or any(type(level) is not int or not 0 <= level < 256 for level in value):
        raise ValueError(f"background must be three levels from 0 to 255, not {value!r}")
    red, green, blue = value
    return red, green, blue


def build_dataclass(kind: type, options: Mapping[str, Any], what: str) -> Any:
    """Build a dataclass from its JSON fields; ValueError names unknown or missing ones."""
    known = [field.name for field in fields(kind)]
    for name in options:
        if name not in known:
            raise ValueError(f"{what} has no {name!r}; it takes {', '.join(known)}")
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error


def _as_json(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_as_json(part) for part in value]
    return value
