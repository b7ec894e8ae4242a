"""All emoji with their names and images, and what kind each is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data_pipelines.shards.shards import BrokenShard, Sample, expand_urls, read_shard
from data_pipelines.sources.emoji import (
    Emoji,
    alike_names,
    draw_emoji,
    fully_qualified,
)
from data_pipelines.sources.emoji_facts import tones_of
from data_pipelines.sources.source import BROKEN_CONTENT, field_image
from data_pipelines.sources.text_files import parsed
from eval.provenance import sha256_of
from mmdlm.vision.pixels import to_pixels

SIZE = 64  # pixels, at which images are compared
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F1FF + 1)
TAGS = range(0xE0020, 0xE007F + 1)  # they spell the region in the flags of England and Scotland


@dataclass(frozen=True)
class Gallery:
    """All emoji there are; a place is an index into them.

    Attributes:
        levels: [G, 3, SIZE, SIZE] uint8.
        right: The names that are right for each: of those drawn pixel for pixel alike, all.
    """

    emoji: tuple[Emoji, ...]
    levels: Tensor
    right: tuple[frozenset[str], ...]
    source: dict[str, str]

    @classmethod
    def draw(cls, font: Path) -> Gallery:
        """Draw them all; ValueError where the font cannot."""
        drawn = tqdm(
            draw_emoji(font, size=SIZE),
            desc="drawing with the font",
            total=len(fully_qualified()),
            unit=" emoji",
        )
        emoji = tuple(one for one in drawn if isinstance(one, Emoji))
        return cls.of(emoji, {"font": font.name, "font_sha256": sha256_of(font)})

    @classmethod
    def read(cls, shards: str) -> Gallery:
        """Read them from shards; ValueError where those are damaged, or hold something else."""
        emoji = []
        for url in expand_urls(shards):
            try:
                emoji += [_emoji_of(sample) for sample in read_shard(url)]
            except BrokenShard as error:
                raise ValueError(f"shard {url}: {error}; write it again") from error
        if not emoji:
            raise ValueError(f"shards {shards} hold no samples; name others")
        return cls.of(emoji, {"shards": shards})

    @classmethod
    def of(cls, emoji: Sequence[Emoji], source: dict[str, str]) -> Gallery:
        """Any emoji; `source` says where they come from."""
        names = alike_names(emoji)
        levels = to_levels([one.image for one in emoji], SIZE)
        return cls(tuple(emoji), levels, tuple(names[one.name] for one in emoji), source)

    def split(self, limit: int | None, *, seed: int) -> dict[str, list[int]]:
        """Return the places of each split that is not empty; `limit` of the trained, at random."""
        trained = [i for i, one in enumerate(self.emoji) if not one.held_out]
        held_out = [i for i, one in enumerate(self.emoji) if one.held_out]
        if limit is not None:
            trained = [trained[i] for i in sorted(some_of(len(trained), limit, seed=seed))]
        splits = {"trained": trained, "held-out": held_out}
        return {name: places for name, places in splits.items() if places}

    def describe(self) -> dict[str, Any]:
        """Return what the numbers were measured on."""
        return {
            "emoji": len(self.emoji),
            "held_out": sum(one.held_out for one in self.emoji),
            "drawn_alike": sum(len(names) > 1 for names in self.right),
            **self.source,
            "emoji_package": version("emoji"),
        }


def _emoji_of(sample: Sample) -> Emoji:
    try:
        facts = parsed(sample["json"])
        return Emoji(
            name=facts["name"],
            names=facts["names"],
            aliases=tuple(facts["aliases"]),
            characters=facts["characters"],
            image=field_image(sample),
            held_out=facts["held_out"],
        )
    except (KeyError, TypeError, *BROKEN_CONTENT) as error:
        raise ValueError(
            f"sample {sample['__key__']} of {sample['__url__']} is no emoji as "
            f"data_pipelines.write_shards writes them ({type(error).__name__}: {error})"
        ) from error


def to_levels(images: Sequence[Image.Image], size: int) -> Tensor:
    """Images -> [N, 3, size, size] uint8, scaled where they have another size."""
    return torch.stack(
        [((to_pixels(one, size, fit="pad") + 1) * 127.5).round().to(torch.uint8) for one in images]
    )


def some_of(count: int, number: int, *, seed: int) -> list[int]:
    """Return `number` of 0 .. count - 1 (or all, where there are fewer), in random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:number].tolist()


def kind(emoji: Emoji) -> str:
    """Return the kind that an emoji is measured with: flags, or its number of skin tones."""
    points = emoji.code_points
    if any(point in REGIONAL_INDICATORS or point in TAGS for point in points):
        return "flag"
    tones = len(tones_of(emoji.characters))
    return ("no skin tone", "one skin tone", "two skin tones")[min(tones, 2)]
