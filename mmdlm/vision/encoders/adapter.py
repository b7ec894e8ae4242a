"""The eye of a language model: images in, features of its width out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdlm.core.sequence import Views
from mmdlm.vision.encoders.anyres import Anyres
from mmdlm.vision.encoders.auto import build_tower, tiling_from_dict
from mmdlm.vision.encoders.crops import CropViews
from mmdlm.vision.encoders.natural import Natural, Rounded
from mmdlm.vision.encoders.pooling import Pooling
from mmdlm.vision.encoders.projector import build_projector, check_projector
from mmdlm.vision.encoders.square import Square
from mmdlm.vision.encoders.tiling import Tiling
from mmdlm.vision.encoders.tower import Layer, Tower
from mmdlm.vision.encoders.transformers_towers import NaflexTower, QwenTower

LIBRARIES = ("transformers", "open_clip")


@dataclass(frozen=True)
class VisionConfig:
    """Everything that makes a `VisionAdapter`, but for the width of its language model.

    Attributes:
        tower: Fields of the tower's own config; see `build_tower`.
        tiling: How images are cut into crops, with the pooling of their features.
        library: Of the tower: "transformers" or "open_clip".
        select_layer: Whose features are taken; see `Tower`.
        projector: See `build_projector`.
        mean: Of each channel, subtracted from and divided out of pixels in [0, 1].
        std: Of each channel, subtracted from and divided out of pixels in [0, 1].
    """

    tower: Mapping[str, Any]
    tiling: Tiling
    library: Literal["transformers", "open_clip"] = "transformers"
    select_layer: Layer = -1
    projector: str = "mlp2x_gelu"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.library not in LIBRARIES:
            raise ValueError(
                f"vision config: library must be one of {', '.join(LIBRARIES)}, "
                f"not {self.library!r}"
            )
        if not isinstance(self.tower, Mapping):
            raise ValueError(f"vision config: tower must be a config, not {self.tower!r}")
        check_projector(self.projector)
        if isinstance(self.tiling, Mapping):
            object.__setattr__(self, "tiling", tiling_from_dict(self.tiling))
        if not isinstance(self.tiling, Square | Anyres | Natural | Rounded):
            raise ValueError(f"vision config: tiling must be a Tiling, not {self.tiling!r}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = isinstance(value, tuple | list) and len(value) == 3
            if not numbers or not all(isinstance(x, int | float) for x in value):
                raise ValueError(f"vision config: {name} must be three numbers, not {value!r}")
            object.__setattr__(self, name, tuple(float(x) for x in value))
        if min(self.std) <= 0:
            raise ValueError(f"vision config: std must be positive, not {self.std}")

    @property
    def pooling(self) -> Pooling | None:
        """What happens to the features of each crop."""
        return self.tiling.pooling

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON can hold them."""
        return {
            "tower": dict(self.tower),
            "tiling": self.tiling.to_dict(),
            "library": self.library,
            "select_layer": self.select_layer,
            "projector": self.projector,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> VisionConfig:
        """Read back `to_dict`; ValueError for an unknown field, or a bad value."""
        known = [field.name for field in fields(VisionConfig)]
        for name in content:
            if name not in known:
                raise ValueError(f"vision config has no {name!r}; it takes {', '.join(known)}")
        for name in ("tower", "tiling"):
            if name not in content:
                raise ValueError(f"vision config has no {name!r}, which it needs")
        return VisionConfig(**content)


class VisionAdapter(nn.Module):
    """Tower, pooling, projector and newline: what a language model sees with.

    Freeze a part by `requires_grad_(False)` on it; a frozen tower keeps no activations.

    Args:
        config: Tower, tiling, pooling and projector.
        width: Of the language model.
        crops_per_pass: Crops that go through the tower at a time; None: all of them.

    Source: arXiv:2310.03744 (projector); arXiv:2408.03326, section 3.2 (newlines).
    """

    def __init__(
        self, config: VisionConfig, width: int, *, crops_per_pass: int | None = None
    ) -> None:
        super().__init__()
        if crops_per_pass is not None and crops_per_pass < 1:
            raise ValueError(f"crops_per_pass must be at least 1, or None, not {crops_per_pass}")
        self.config, self.crops_per_pass = config, crops_per_pass
        self.tower: Tower = build_tower(config.library, config.tower, config.select_layer)
        self.projector = build_projector(config.projector, self.tower.width, width)
        newline = nn.Parameter(torch.randn(width) * width**-0.5) if config.tiling.newline else None
        self.register_parameter("newline", newline)
        self.newline: nn.Parameter | None
        self._check_tiling(config.tiling)
        self.freeze_idle()

    def forward(self, views: Sequence[Views]) -> Tensor:
        """Images -> the features of their slots [F, D], image after image.

        One pass of the tower over the crops of all images that it has not seen (`look`).
        """
        if not views:
            raise ValueError("no images to look at")
        seen = self.look(views)
        features = torch.cat([image.crops.flatten(0, 1) for image in seen])  # [.., D_tower]
        projected = self.projector(features.to(_dtype(self.projector)))  # [.., D]
        counts = [image.crops.shape[0] * image.crops.shape[1] for image in seen]
        slots = []
        for image, part in zip(seen, projected.split(counts), strict=True):
            rows, columns = image.layout.patches
            grids = rearrange(part, "(c h w) d -> c h w d", h=rows, w=columns)
            if self.config.pooling is not None:
                grids = self.config.pooling(grids)
            slots.append(image.layout.arrange(grids, self.newline))
        return torch.cat(slots)

    def look(self, views: Sequence[Views]) -> tuple[CropViews, ...]:
        """Replace the pixels of images by the tower's features [C, P, D_tower].

        For shards of features: `adapter(adapter.look(views))` is `adapter(views)`. Images that
        were seen before pass through, and one that is given several times is looked at once.
        Raises ValueError for crops that are not of the tower's size, or features not of its width.
        """
        images = [self._checked(image) for image in views]
        new = {id(p.crops): p for p in images if not p.seen}
        trained = any(parameter.requires_grad for parameter in self.tower.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            features = self._features([crop for p in new.values() for crop in p.crops])
        done, start = {}, 0
        for key, image in new.items():
            stop = start + len(image.crops)
            done[key] = torch.stack(features[start:stop])
            start = stop
        return tuple(
            image if image.seen else replace(image, crops=done[id(image.crops)]) for image in images
        )

    def freeze_idle(self) -> None:
        """Freeze what of the tower has no part in the features, as every new adapter does.

        A closing LayerNorm behind the selected layer, say; parallel wrappers would wait for its
        gradient. Call it after weights were loaded by new parameters (`from_pretrained`).
        """
        for parameter in self.tower.idle_parameters():
            parameter.requires_grad_(False)

    def _features(self, crops: list[Tensor]) -> list[Tensor]:
        """Crops [3, H, W] -> features [P, D_tower] of each.

        uint8 levels are normalized as the tower's pixels were; floats are that already.
        """
        if not crops:
            return []
        dtype, device = self.tower.dtype, crops[0].device
        mean, std = (
            torch.tensor(value, device=device)[:, None, None]
            for value in (self.config.mean, self.config.std)
        )
        step = self.crops_per_pass or len(crops)
        features: list[Tensor] = []
        for start in range(0, len(crops), step):
            pixels = [
                (crop if crop.is_floating_point() else (crop / 255 - mean) / std).to(dtype)
                for crop in crops[start : start + step]
            ]
            features += self.tower(pixels)
        return features

    def _checked(self, image: Views) -> CropViews:
        """Return the views of one image, if this adapter can process them."""
        if not isinstance(image, CropViews):
            raise ValueError(
                f"a vision adapter looks at views of its tiling, not at {type(image).__name__}"
            )
        layout, shape = image.layout, list(image.crops.shape)
        if image.seen:
            patches, width = layout.patches[0] * layout.patches[1], self.tower.width
            if shape[1:] != [patches, width]:
                raise ValueError(
                    f"features of shape {shape[1:]} a crop, but its {patches} patches and this "
                    f"tower need {[patches, width]}; compute them with the same tower"
                )
        elif len(shape) != 4 or shape[1] != 3:
            raise ValueError(
                f"crops have shape {shape}; pixels [C, 3, H, W] or features [C, P, D] are needed"
            )
        elif (grid := self.tower.grid(*shape[2:])) != layout.patches:
            raise ValueError(
                f"views of {layout.patches[0]}x{layout.patches[1]} patches a crop, but the vision "
                f"tower sees {grid[0]}x{grid[1]}; cut them with the tiling of this model"
            )
        expected = layout.patches
        if self.config.pooling is not None:
            expected = self.config.pooling.grid(*expected)
        if layout.pooled != expected or (layout.newline and self.newline is None):
            raise ValueError(
                f"views laid out for {layout.pooled[0]}x{layout.pooled[1]} features a crop, "
                f"newline {layout.newline}, but this adapter makes {expected[0]}x{expected[1]}, "
                f"newline {self.newline is not None}; cut them with the tiling of this model"
            )
        return image

    def _check_tiling(self, tiling: Tiling) -> None:
        """ValueError where the tiling cuts crops that the tower does not take."""
        if isinstance(tiling, Square | Anyres):
            grid = self.tower.grid(tiling.size, tiling.size)
            if grid != (tiling.grid, tiling.grid):
                raise ValueError(
                    f"vision config: tiling has grid {tiling.grid}, but its tower sees "
                    f"{grid[0]}x{grid[1]} patches in {tiling.size}x{tiling.size} pixels"
                )
        elif isinstance(tiling, Natural | Rounded):
            if not isinstance(self.tower, NaflexTower | QwenTower):
                raise ValueError(
                    f"vision config: {tiling.kind} tiling needs a tower of model_type "
                    "siglip2_vision_model or qwen2_5_vl_vision; take square or anyres"
                )
            self.tower.grid(tiling.patch, tiling.patch)


def _dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype that a module computes in; quantized weights do not count."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())
