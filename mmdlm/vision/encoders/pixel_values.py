"""Views of images as plain tensors, which transformers' processors give and collators stack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.vision.encoders.crops import CropViews
from mmdlm.vision.encoders.natural import Natural, Rounded
from mmdlm.vision.encoders.tiling import Tiling


def stacked(views: Sequence[CropViews]) -> Tensor:
    """Stack the crops of images, one after the other.

    Args:
        views: Images.

    Returns:
        [C, 3, H, W] in the dtype of the crops; smaller ones are padded at the right and below.
    """
    height, width = (max(image.crops.shape[axis] for image in views) for axis in (2, 3))
    return torch.cat(
        [
            F.pad(image.crops, (0, width - image.crops.shape[3], 0, height - image.crops.shape[2]))
            for image in views
        ]
    )


def unstacked(
    pixel_values: Tensor,
    image_sizes: Tensor | Sequence[Sequence[int]],
    tiling: Tiling,
    *,
    batch_num_images: Tensor | Sequence[int] | None = None,
) -> tuple[CropViews, ...]:
    """Return the views that `stacked` stacked.

    Args:
        pixel_values: [C, 3, H, W] crops of N images.
        image_sizes: [N, 2] (height, width) of the images before they were cut.
        tiling: That cut them.
        batch_num_images: Images of each row of the batch; None: one a row. A tiling may cut an
            image that is not the only one of its row in another way.

    Returns:
        The views of the N images.

    Raises:
        ValueError: If the numbers do not fit each other.
    """
    sizes = torch.as_tensor(image_sizes).tolist()
    counts = [1] * len(sizes)
    if batch_num_images is not None:
        counts = torch.as_tensor(batch_num_images).flatten().tolist()
    if sum(counts) != len(sizes):
        raise ValueError(
            f"image_sizes has {len(sizes)} images, but batch_num_images {counts} has {sum(counts)}"
        )
    alone = [count == 1 for count in counts for _ in range(count)]
    layouts = [
        tiling.layout(width, height, alone=one)
        for (height, width), one in zip(sizes, alone, strict=True)
    ]
    crops = [layout.crops for layout in layouts]
    if sum(crops) != len(pixel_values):
        raise ValueError(
            f"pixel_values has {len(pixel_values)} crops, but images of the sizes {sizes} have "
            f"{sum(crops)}; give those that the processor of this model makes"
        )
    parts = pixel_values.split(crops)
    if isinstance(tiling, Natural | Rounded):
        parts = tuple(
            part[..., : layout.patches[0] * tiling.patch, : layout.patches[1] * tiling.patch]
            for part, layout in zip(parts, layouts, strict=True)
        )
    return tuple(CropViews(*one) for one in zip(parts, layouts, strict=True))
