"""Vision towers of the open_clip library."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdlm.vision.encoders.tower import Layer, Tower, blocks_to_run, check_square


class OpenClipTower(Tower):
    """A ViT of open_clip, its own or timm's (open_clip's SigLIP).

    `config` is {"model": a name that open_clip knows} or the image half of an open_clip config,
    {"embed_dim": ..., "vision_cfg": {...}}. Nothing is downloaded. The tensors are those of
    open_clip's `visual`, under that name. open_clip gives out no layer 0.
    """

    def __init__(self, config: Mapping[str, Any], select_layer: Layer = -1) -> None:
        super().__init__()
        self.visual: Any = _open_clip_model(config)
        trunk = getattr(self.visual, "trunk", None)  # timm's model
        self._stem, blocks = ("trunk.", trunk) if trunk is not None else ("transformer.", None)
        if trunk is None:
            blocks = getattr(self.visual, "transformer", None)
            depth = len(getattr(blocks, "resblocks", ()))
            grid, width = getattr(self.visual, "grid_size", None), getattr(blocks, "width", 0)
            size = getattr(self.visual, "image_size", None)
        else:
            depth = len(getattr(trunk, "blocks", ()))
            embed = getattr(trunk, "patch_embed", None)
            grid, size = getattr(embed, "grid_size", None), getattr(embed, "img_size", None)
            width = getattr(trunk, "embed_dim", 0)
        if not depth or grid is None or size is None:
            raise ValueError(
                f"vision tower: open_clip's {type(trunk or self.visual).__name__} has no features "
                "of patches; take a ViT"
            )
        self.width, self._size, self._grid = int(width), tuple(size), tuple(grid)
        self.final = select_layer == "final"
        self.blocks = blocks_to_run(select_layer, depth)
        if self.blocks == 0:
            raise ValueError(
                f"vision tower: open_clip gives out what leaves a block, not select_layer 0; take "
                f"1 to {depth}, or count from the end"
            )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """See `Tower.grid`."""
        if (height, width) != self._size:
            check_square(height, width, self._size[0])
        return self._grid[0], self._grid[1]

    def forward(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """See `Tower.forward`."""
        out = self.visual.forward_intermediates(
            torch.stack(list(crops)),
            indices=[self.blocks - 1],
            stop_early=True,
            normalize_intermediates=self.final,
            intermediates_only=True,
            output_fmt="NLC",
        )
        return list(out["image_intermediates"][0])

    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """See `Tower.idle_parameters`."""
        if self._stem == "trunk.":
            idle = ["trunk.fc_norm.", "trunk.attn_pool.", "trunk.head.", "head."]
            norm, blocks = "trunk.norm.", "trunk.blocks."
        else:
            idle = ["proj", "attn_pool"]
            norm, blocks = "ln_post.", "transformer.resblocks."
        if not self.final:
            idle.append(norm)
        for name, parameter in self.visual.named_parameters():
            late = name.startswith(blocks) and int(name[len(blocks) :].split(".")[0]) >= self.blocks
            if late or name.startswith(tuple(idle)):
                yield parameter


def _open_clip_model(config: Mapping[str, Any]) -> nn.Module:
    timm = str((config.get("vision_cfg") or {}).get("timm_model_name") or "")
    if set(timm) & set(":/"):  # of the Hub, or of a folder
        raise ValueError(
            f"vision tower: timm_model_name {timm!r} is no name of one of timm's models"
        )
    try:
        open_clip = importlib.import_module("open_clip")
        model = importlib.import_module("open_clip.model")
    except ImportError as error:
        raise ValueError(
            "an open_clip tower needs open_clip; install it with: pip install 'mmdlm[open_clip]'"
        ) from error
    options = dict(config)
    if "model" in options:
        name = options.pop("model")
        found = open_clip.get_model_config(name)
        if found is None:
            raise ValueError(f"vision tower: open_clip knows no model {name!r}")
        half = ("embed_dim", "vision_cfg", "quick_gelu")
        options = {key: found[key] for key in half if key in found} | options
    for key in options:
        if key not in ("embed_dim", "vision_cfg", "quick_gelu"):
            raise ValueError(
                f"vision tower: an open_clip config has no {key!r}; it takes model, embed_dim, "
                "vision_cfg and quick_gelu"
            )
    try:
        # features of all patches, in training too; and no download
        cfg = {**options["vision_cfg"], "patch_dropout": 0.0, "timm_model_pretrained": False}
        return model._build_vision_tower(
            options["embed_dim"], cfg, quick_gelu=options.get("quick_gelu", False)
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"vision tower: open_clip cannot build {options}: {error}") from error
