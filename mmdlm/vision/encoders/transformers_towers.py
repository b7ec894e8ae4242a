"""Vision towers of the transformers library: SigLIP, SigLIP 2 and Qwen2.5-VL."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mmdlm.vision.encoders.tower import Layer, Tower, blocks_to_run, check_square


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
        self.blocks = blocks_to_run(select_layer, len(self.encoder.layers))

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
        check_square(height, width, self.image_size)
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


def _ends(lengths: Sequence[int]) -> Tensor:
    """Lengths of parts -> where they end, after a 0; on the CPU, where they are split by it."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
