"""Vision adapters small enough for a test, and images to tell apart."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from data_pipelines.write_shards import png_bytes
from mmdlm.vision.encoders.adapter import VisionAdapter, VisionConfig
from mmdlm.vision.encoders.anyres import Anyres
from mmdlm.vision.encoders.square import Square
from mmdlm.vision.encoders.tiling import Tiling

TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SQUARE = Square(size=8, grid=2)  # 4 slots
TILES = Anyres(size=8, grid=2, shapes=((2, 1), (1, 2), (2, 2)))


def adapter(tiling: Tiling = SQUARE, *, seed: int = 0, **options: Any) -> VisionAdapter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionAdapter(VisionConfig(tower=TOWER, tiling=tiling, **options), 16).eval()


def plain(red: int, size: tuple[int, int] = (8, 8)) -> bytes:
    return png_bytes(Image.new("RGB", size, (red, 9, 9)))
