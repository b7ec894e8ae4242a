"""Vision towers: what turns crops into features of their patches."""

from __future__ import annotations

import importlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

Layer = int | Literal["final"]


class Tower(nn.Module, ABC):
    """Crops -> features of their patches, taken behind one of its blocks.

    `select_layer` counts as transformers counts hidden states: 0 is what enters the first block, k
    what leaves the k-th, -1 what leaves the last and -2 what leaves the one before it; "final" is
    -1 behind the closing LayerNorm. Blocks behind the selected one do not run. They stay, with
    whatever else is not asked for, so that every tensor of a checkpoint has its place.

    width  D_tower
    """

    width: int

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches of a crop of that many pixels.

        Raises ValueError where the tower does not take such crops.
        """

    @abstractmethod
    def forward(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """Normalised crops [3, H, W] -> features [P, D_tower] of each, in one pass."""

    @abstractmethod
    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that have no part in the features, and never get a gradient."""

    @property
    def dtype(self) -> torch.dtype:
        """What the tower computes in; quantised weights do not count."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())


class TransformersTower(Tower):
    """What transformers' SigLIP and SigLIP 2 share: parts by the same names.

    The tensors are those of `SiglipVisionModel` and `Siglip2VisionModel`: `embeddings.*`,
    `encoder.layers.N.*`, `post_layernorm.*`, and `head.*` if the config has `vision_use_head`,
    which is off by default here.
    """

    family: ClassVar[str]  # what transformers calls its classes
    embeddings: Any
    encoder: Any
    post_layernorm: Any
    head: Any

    def __init__(self, config: Mapping[str, Any], select_layer: Layer = -1) -> None:
        super().__init__()
        model, options = _transformers_model(
            {"vision_use_head": False, **config}, self.family, f"{self.family}VisionModel"
        )
        self.embeddings, self.encoder = model.embeddings, model.encoder
        self.post_layernorm = model.post_layernorm
        self.head = getattr(model, "head", None)
        self.width, self.patch_size = int(options.hidden_size), int(options.patch_size)
        self.final = select_layer == "final"
        self.blocks = _blocks_to_run(select_layer, len(self.encoder.layers))

    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """See `Tower.idle_parameters`."""
        yield from self.encoder.layers[self.blocks :].parameters()
        if not self.final:
            yield from self.post_layernorm.parameters()
        if self.head is not None:
            yield from self.head.parameters()

    def _run(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Embeddings [C, P, D_tower], and the keys to see [C, 1, 1, P] -> [C, P, D_tower]."""
        for block in self.encoder.layers[: self.blocks]:
            x = block(x, mask)
        return self.post_layernorm(x) if self.final else x


class SiglipTower(TransformersTower):
    """SigLIP, and SigLIP 2 of fixed resolution, whose model type is SigLIP's.

    Source: arXiv:2303.15343; arXiv:2502.14786.
    """

    family: ClassVar[str] = "Siglip"

    def __init__(self, config: Mapping[str, Any], select_layer: Layer = -1) -> None:
        super().__init__(config, select_layer)
        del self.embeddings.position_ids  # 0, 1, 2, ...; nothing restores it on the meta device
        self.image_size = int(self.embeddings.image_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """See `Tower.grid`."""
        _check_square(height, width, self.image_size)
        side = self.image_size // self.patch_size
        return side, side

    def forward(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """See `Tower.forward`."""
        x = self.embeddings.patch_embedding(torch.stack(list(crops)))  # [C, D_tower, side, side]
        x = rearrange(x, "c d h w -> c (h w) d") + self.embeddings.position_embedding.weight
        return list(self._run(x, None))


class NaflexTower(TransformersTower):
    """SigLIP 2 for images in their own aspect ratio; see `tiling.Natural`.

    Images of different sizes go through in one pass, each blind to padding and to the others.

    Source: arXiv:2502.14786, section 2.4.
    """

    family: ClassVar[str] = "Siglip2"

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """See `Tower.grid`."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"crops of {width}x{height} pixels are not made of whole patches of "
                f"{self.patch_size}; cut them with the tiling of this model"
            )
        return height // self.patch_size, width // self.patch_size

    def forward(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """See `Tower.forward`."""
        patches = [
            rearrange(crop, "c (h p) (w q) -> (h w) (p q c)", p=self.patch_size, q=self.patch_size)
            for crop in crops
        ]
        grids = torch.tensor([self.grid(*crop.shape[1:]) for crop in crops])
        counts = [len(part) for part in patches]
        x = nn.utils.rnn.pad_sequence(patches, batch_first=True)  # [C, P, patch * patch * 3]
        x = self.embeddings(x, grids)  # [C, P, D_tower]
        mask = None
        if min(counts) < max(counts):
            place = torch.arange(x.shape[1], device=x.device)
            mask = place < torch.tensor(counts, device=x.device)[:, None, None, None]
        return [row[:count] for row, count in zip(self._run(x, mask), counts, strict=True)]


class QwenTower(Tower):
    """Qwen2.5-VL's vision transformer, for images of any size; see `tiling.Rounded`.

    What leaves it is what leaves its merger: one feature of a square of `spatial_merge_size` times
    as many patches, which is what counts as a patch here. Most blocks look within windows of such
    squares, some at the whole image; no image sees another. The tensors are those of
    `Qwen2_5_VisionTransformerPretrainedModel`: `patch_embed.*`, `blocks.N.*` and `merger.*`.

    Source: arXiv:2502.13923, section 2.1.
    """

    def __init__(self, config: Mapping[str, Any], select_layer: Layer = "final") -> None:
        super().__init__()
        if select_layer != "final":
            raise ValueError(
                "vision tower: Qwen2.5-VL's gives out what leaves its merger; take select_layer "
                f"'final', not {select_layer!r}"
            )
        model, options = _transformers_model(
            config, "Qwen2_5_VL", "Qwen2_5_VisionTransformerPretrainedModel"
        )
        self.patch_embed: Any = model.patch_embed
        self.blocks: Any = model.blocks
        self.merger: Any = model.merger
        self.width, self.patch_size = int(options.out_hidden_size), int(options.patch_size)
        self.merged = int(options.spatial_merge_size)  # patches of a square's side
        self.frames = int(options.temporal_patch_size)  # an image stands still for so many
        self.window = int(options.window_size) // self.merged // self.patch_size  # in squares
        self.wide = frozenset(options.fullatt_block_indexes)  # blocks that see the whole image
        self.head_dim = int(options.hidden_size) // int(options.num_heads)
        rope = getattr(options, "rope_parameters", None) or {}  # of transformers 5
        self.theta = float(rope.get("rope_theta", 10_000.0))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """See `Tower.grid`."""
        side = self.patch_size * self.merged
        if height % side or width % side:
            raise ValueError(
                f"crops of {width}x{height} pixels are not made of whole patches of {side}; cut "
                "them with the tiling of this model"
            )
        return height // side, width // side

    def forward(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """See `Tower.forward`."""
        grids = [self.grid(*crop.shape[1:]) for crop in crops]
        squares = [rows * columns for rows, columns in grids]
        order, windows = self._windows(grids)
        order = order.to(crops[0].device)
        patches = [
            repeat(
                crop,
                "c (h a p) (w b q) -> (h w) (a b) (c t p q)",
                a=self.merged,
                b=self.merged,
                p=self.patch_size,
                q=self.patch_size,
                t=self.frames,
            )
            for crop in crops
        ]
        x = self.patch_embed(torch.cat(patches)[order].flatten(0, 1))  # [P, D]
        rotation = self._rotation(grids, order)
        area = self.merged**2
        near, far = (_ends([area * n for n in lengths]) for lengths in (windows, squares))
        for number, block in enumerate(self.blocks):
            ends = far if number in self.wide else near
            x = block(x, cu_seqlens=ends, position_embeddings=rotation)
        x = self.merger(x)[order.argsort()]  # [squares, D_tower]
        return list(x.split(squares))

    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """See `Tower.idle_parameters`."""
        yield from ()

    def _windows(self, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, list[int]]:
        """(squares of all images, ordered by window; number of squares of each window)."""
        order, lengths, before = [], [], 0
        for rows, columns in grids:
            across = -(-columns // self.window)  # windows that lie side by side
            row, column = torch.arange(rows)[:, None], torch.arange(columns)
            window = (row // self.window * across + column // self.window).flatten()
            order.append(before + window.argsort(stable=True))
            lengths += window.bincount().tolist()
            before += rows * columns
        return torch.cat(order), lengths

    def _rotation(self, grids: Sequence[tuple[int, int]], order: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [P, d] of the patches' rows and columns, the squares in `order`.

        Half of the pairs of channels turn with the row, the others with the column.
        """
        # Computed here, not kept as a buffer: meta-device loading has nothing to restore.
        half, device = self.head_dim // 2, order.device
        channel = torch.arange(0, half, 2, device=device, dtype=torch.float32)
        places = [
            rearrange(
                torch.cartesian_prod(
                    torch.arange(rows * self.merged), torch.arange(columns * self.merged)
                ),
                "(h a w b) place -> (h w) (a b) place",
                h=rows,
                a=self.merged,
                w=columns,
            )
            for rows, columns in grids
        ]
        place = torch.cat(places).to(device)[order].flatten(0, 1)  # [P, 2]
        angle = (place[..., None] * self.theta ** (-channel / half)).flatten(1)  # [P, d / 2]
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()


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
        self.blocks = _blocks_to_run(select_layer, depth)
        if self.blocks == 0:
            raise ValueError(
                f"vision tower: open_clip gives out what leaves a block, not select_layer 0; take "
                f"1 to {depth}, or count from the end"
            )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """See `Tower.grid`."""
        if (height, width) != self._size:
            _check_square(height, width, self._size[0])
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


def build_tower(library: str, config: Mapping[str, Any], select_layer: Layer = -1) -> Tower:
    """The tower of a config, with random weights.

    library  "transformers": `config` has the fields of SiglipVisionConfig, Siglip2VisionConfig or
             Qwen2_5_VLVisionConfig, and its `model_type`; "open_clip": see `OpenClipTower`
    Raises ValueError for an unknown library, model type, field or layer.
    """
    if library == "open_clip":
        return OpenClipTower(config, select_layer)
    if library != "transformers":
        raise ValueError(
            f"vision tower: library must be 'transformers' or 'open_clip', not {library!r}"
        )
    kinds: dict[str, Callable[[Mapping[str, Any], Layer], Tower]] = {
        "siglip_vision_model": SiglipTower,
        "siglip2_vision_model": NaflexTower,
        "qwen2_5_vl_vision": QwenTower,
    }
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"vision tower: model_type must be one of {', '.join(kinds)}, not {kind!r}"
        )
    return kinds[kind](config, select_layer)


def _transformers_model(
    config: Mapping[str, Any], family: str, model_class: str
) -> tuple[Any, Any]:
    """(model, config) of transformers' vision model, checked against the fields that it has.

    A tower takes the parts out of the model: where a model of transformers stands inside another,
    transformers gives its tensors other names when it saves and loads them.
    """
    import transformers

    config_class: Any = getattr(transformers, f"{family}VisionConfig")
    general = {field.name for field in fields(transformers.PreTrainedConfig)}
    known = {field.name for field in fields(config_class)} - general
    options = dict(config)
    options.pop("model_type", None)
    for key in options:
        if key not in known:
            raise ValueError(
                f"vision tower: {family}VisionConfig has no {key!r}; it takes "
                f"{', '.join(sorted(known))}"
            )
    for key in ("image_size", "patch_size"):
        if key in options and (type(options[key]) is not int or options[key] < 1):
            raise ValueError(
                f"vision tower: {key} must be a whole number from 1, not {options[key]!r}"
            )
    try:
        filled = config_class(**options, attn_implementation="sdpa")
        model = getattr(transformers, model_class)(filled)
    except Exception as error:  # transformers' validators raise errors of their own kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"vision tower: {reason}") from error
    return getattr(model, "vision_model", model), filled  # transformers 5.0 wraps it once more


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


def _blocks_to_run(select_layer: Layer, depth: int) -> int:
    """How many blocks run for `select_layer`."""
    if select_layer == "final":
        return depth
    if type(select_layer) is not int or not -depth - 1 <= select_layer <= depth:
        raise ValueError(
            f"vision tower: select_layer must be 'final' or from {-depth - 1} to {depth}, as the "
            f"tower has {depth} blocks, not {select_layer!r}"
        )
    return select_layer if select_layer >= 0 else depth + 1 + select_layer


def _ends(lengths: Sequence[int]) -> Tensor:
    """Lengths of parts -> where they end, after a 0; on the CPU, where they are split by it."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _check_square(height: int, width: int, size: int) -> None:
    if (height, width) != (size, size):
        raise ValueError(
            f"crops of {width}x{height} pixels, but the vision tower takes {size}x{size}; cut them "
            "with the tiling of this model"
        )
