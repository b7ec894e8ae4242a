"""All that an image may show, from shards: where a reward looks for a drawing's neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from data_pipelines.shards.shards import BrokenShard, expand_urls, read_shard
from data_pipelines.sources.source import BROKEN_CONTENT, field_image
from data_pipelines.sources.text_files import decoded
from mmdlm.rl.rewards.images.nearest_name import Gallery
from mmdlm.rl.rewards.images.neighbors import first_alike
from mmdlm.vision.pixels import to_pixels


@dataclass(frozen=True)
class Shown:
    """Images of shards by their names; of those that are alike to the last bit, all names hold.

    Attributes:
        urls: Shards, see `data_pipelines.shards.shards.expand_urls`: all there is, the held-out
            ones as well.
        field: Of a sample that holds the name.
        size: At which images are compared.
    """

    urls: str | list[str]
    field: str = "txt"
    size: int = 64

    def read(self) -> Gallery:
        """ValueError for shards that are damaged, or hold no images or names."""
        names: list[str] = []
        images: list[Image.Image] = []
        for url in expand_urls(self.urls):
            try:
                for sample in read_shard(url):
                    images.append(field_image(sample))
                    names.append(decoded(sample[self.field]).strip())
            except (BrokenShard, KeyError, *BROKEN_CONTENT) as error:
                raise ValueError(f"gallery: shard {url}: {error}; write it again") from error
        if not images:
            raise ValueError(f"gallery: {self.urls} hold no images; name others")
        levels = to_levels(images, size=self.size)
        alike: dict[int, set[str]] = {}
        first = first_alike(levels).tolist()
        for place, name in zip(first, names, strict=True):
            alike.setdefault(place, set()).add(name)
        return Gallery(
            names=tuple(frozenset(alike[place]) for place in first),
            levels=levels,
            prepare=partial(to_levels, size=self.size),
        )


def to_levels(images: Sequence[Image.Image], *, size: int) -> Tensor:
    """Images -> [N, 3, size, size] uint8, scaled where they have another size."""
    pixels = torch.stack([to_pixels(one, size, fit="pad") for one in images])
    return ((pixels + 1) * 127.5).round().to(torch.uint8)
