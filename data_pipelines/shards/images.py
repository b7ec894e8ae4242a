"""Batches of pixels, for training an image tokenizer; resumable as all streams are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from data_pipelines.room import check_room
from data_pipelines.shards.sample_stats import BrokenSample, SampleStats, State, one_line
from data_pipelines.shards.shards import expand_urls
from data_pipelines.shards.stream import Reader, ShardStream
from data_pipelines.shards.workers import Loader, check_numbers, workers_for
from data_pipelines.sources.source import BROKEN_CONTENT, IMAGES, field_image
from mmdlm.vision.image_files import MAX_PIXELS
from mmdlm.vision.pixels import Fit, to_pixels


def image_loader(
    urls: str | list[str],
    *,
    batch_size: int,
    image_size: int,
    fit: Fit = "crop",
    seed: int = 0,
    num_workers: int | None = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle_buffer: int = 4096,
    sampling_weight: str | None = None,
    max_broken: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    cache_bytes: int = 1 << 28,
    pin_memory: bool = False,
    allow_pipe: bool = False,
) -> Loader:
    """Endless batches [batch_size, 3, image_size, image_size] in [-1, 1] of one process.

    Arguments as in `build_loader`, `sampling_weight` and `allow_pipe` as in `Source`; images of
    more than `max_pixels` count as broken. Raises ValueError for an empty list of shards, a number
    out of its range, and where more than `max_broken` cannot be read.
    """
    num_workers = workers_for(num_workers, on_gpu=pin_memory)
    numbers = {
        "batch_size": batch_size,
        "image_size": image_size,
        "fit": fit,
        "seed": seed,
        "num_workers": num_workers,
        "rank": rank,
        "world_size": world_size,
        "shuffle_buffer": shuffle_buffer,
    }
    check_numbers({**numbers, "max_broken": max_broken, "cache_bytes": cache_bytes})
    check_room(
        f"a batch of {batch_size} images of {image_size} x {image_size} pixels",
        {"pixels": 2 * 4 * 3 * batch_size * image_size**2},  # one by one, then together
        mend="batch_size",
    )
    found = expand_urls(urls, allow_pipe=allow_pipe)
    settings = {"shards": [len(found)], "sampling_weight": sampling_weight, **numbers}
    make = partial(
        _Images,
        urls=found,
        batch_size=batch_size,
        image_size=image_size,
        fit=fit,
        seed=seed,
        shuffle_buffer=shuffle_buffer,
        sampling_weight=sampling_weight,
        max_broken=max_broken,
        max_pixels=max_pixels,
        cache_bytes=cache_bytes,
    )
    return Loader(make, settings, pin_memory=pin_memory)


class _Images:
    """Batches of one worker."""

    def __init__(
        self,
        reader: Reader,
        *,
        urls: list[str],
        batch_size: int,
        image_size: int,
        fit: Fit,
        seed: int,
        shuffle_buffer: int,
        sampling_weight: str | None,
        max_broken: float,
        max_pixels: int,
        cache_bytes: int,
    ) -> None:
        self.max_pixels = max_pixels
        self.batch_size, self.image_size, self.fit = batch_size, image_size, fit
        self._stats = SampleStats(max_broken)
        self._stream = ShardStream(
            urls,
            reader=reader,
            seed=seed,
            shuffle_buffer=shuffle_buffer,
            fields=IMAGES,
            sampling_weight=sampling_weight,
            cache_bytes=cache_bytes,
        )

    def __iter__(self) -> Iterator[Tensor]:
        pixels: list[Tensor] = []
        for item in self._stream:
            if isinstance(item, BrokenSample):
                self._stats.add_broken(item)
                continue
            try:
                image = field_image(item, max_pixels=self.max_pixels)
                pixels.append(to_pixels(image, self.image_size, fit=self.fit))
            except BROKEN_CONTENT as error:
                self._stats.add_broken(
                    BrokenSample(item["__url__"], item["__key__"], one_line(error))
                )
                continue
            self._stats.good += 1
            if len(pixels) == self.batch_size:
                yield torch.stack(pixels)
                pixels = []

    def state_dict(self) -> State:
        source = {"stream": self._stream.state_dict(), "stats": self._stats.state_dict()}
        return {"sources": [source]}

    def load_state_dict(self, state: State) -> None:
        (source,) = state["sources"]
        self._stream.load_state_dict(source["stream"])
        self._stats.load_state_dict(source["stats"])
