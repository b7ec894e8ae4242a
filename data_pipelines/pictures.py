"""Batches of pixels, for training an image tokenizer; resumable as all streams are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from data_pipelines.shards import expand_urls
from data_pipelines.source import BROKEN_CONTENT, PICTURES, field_image
from data_pipelines.stream import Broken, Reader, ShardStream, State, Tally, one_line
from mmdlm.vision.pixels import Fit, to_pixels


class PictureLoader:
    """Endless batches [batch_size, 3, image_size, image_size] in [-1, 1] of one process.

    Decoding happens in the training process: pictures are small beside the step that they feed.
    Raises ValueError for an empty list of shards, and where more than `max_broken` cannot be read.
    """

    def __init__(
        self,
        urls: str | list[str],
        *,
        batch_size: int,
        image_size: int,
        fit: Fit = "crop",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 4096,
        max_broken: float = 0.01,
        cache_bytes: int = 1 << 28,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        self.batch_size, self.image_size, self.fit = batch_size, image_size, fit
        self._tally = Tally(max_broken)
        self._stream = ShardStream(
            expand_urls(urls),
            reader=Reader(rank, world_size),
            seed=seed,
            shuffle_buffer=shuffle_buffer,
            fields=PICTURES,
            cache_bytes=cache_bytes,
        )

    def __iter__(self) -> Iterator[Tensor]:
        pixels: list[Tensor] = []
        for item in self._stream:
            if isinstance(item, Broken):
                self._tally.add_broken(item)
                continue
            try:
                pixels.append(to_pixels(field_image(item), self.image_size, fit=self.fit))
            except BROKEN_CONTENT as error:
                self._tally.add_broken(Broken(item["__url__"], item["__key__"], one_line(error)))
                continue
            self._tally.good += 1
            if len(pixels) == self.batch_size:
                yield torch.stack(pixels)
                pixels = []

    def state_dict(self) -> State:
        """Position after the batch that was yielded last."""
        return {"stream": self._stream.state_dict(), "tally": self._tally.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """The next batch is the one that followed that position."""
        self._stream.load_state_dict(state["stream"])
        self._tally.load_state_dict(state["tally"])
