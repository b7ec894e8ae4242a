"""Job: image shards -> code shards, so that training never runs the image tokenizer.

    accelerate launch -m data_pipelines.tokenize_images --shards data/emoji/train \\
        --tokenizer runs/emoji/image_tokenizer --out data/emoji/train_codes

Each process takes every n-th shard. A shard is written beside and then renamed, and the same
command goes on after an interruption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines import command_line
from data_pipelines.shard_job import Rewriter, own_device, rewrite_shards, whole_samples
from data_pipelines.shards import Sample, expand_urls
from data_pipelines.source import BROKEN_CONTENT, PICTURES, encode_array, field_image
from data_pipelines.stream import Broken, Tally, one_line
from mmdlm.vision.image_files import MAX_PIXELS
from mmdlm.vision.image_tokenizer import ImageTokenizer, load_image_tokenizer
from mmdlm.vision.pixels import Fit, to_pixels

CODES = "codes.npy"
RECORD = "codes.json"  # which tokenizer the codes are of


def main(
    shards: str | list[str],
    tokenizer: Path,
    out: Path,
    *,
    batch_size: int = 64,
    image_size: int | None = None,
    fit: Fit = "crop",
    keep_images: bool = False,
    max_broken: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    device: str | None = None,
    threads: int = 4,
) -> None:
    """Replace the pictures of shards by their codes; texts and all else stay.

    Args:
        shards: Folder, path, glob, brace range or URL of image shards, or several of them.
        tokenizer: Folder of the image tokenizer (config.json, model.safetensors).
        out: Folder for the code shards, which keep the names of their image shards.
        batch_size: Pictures that are encoded at once.
        image_size: Edge in pixels to which pictures are scaled; default: the tokenizer's own.
        fit: How a picture that is not square becomes so: crop, pad with white, or stretch.
        keep_images: Keep the pictures beside their codes.
        max_broken: Share of broken pictures that are skipped and listed; more stop the job.
        max_pixels: Images of more pixels are not decoded, and count as broken.
        device: Where to compute; default: this process's GPU, else the CPU.
        threads: Threads that decode pictures.
    """
    if batch_size < 1 or threads < 1:
        raise ValueError(f"batch_size {batch_size} and threads {threads} must be 1 or more")
    tally = Tally(max_broken)

    def build() -> Encoder:
        model = load_image_tokenizer(tokenizer).to(device or own_device())
        size = image_size or model.image_size
        return Encoder(model, size, fit, batch_size, keep_images, max_pixels, tally)

    expand_urls(shards)  # a path that is wrong is said before the tokenizer is read
    record: dict[str, object] = {
        "tokenizer": _fingerprint(tokenizer),
        "image_size": image_size,
        "fit": fit,
        "keep_images": keep_images,
    }
    rewrite_shards(shards, out, record=(RECORD, record), build=build, threads=threads)


@dataclass(frozen=True)
class Encoder(Rewriter):
    """Samples with pictures -> samples with codes, `batch_size` at a time."""

    tokenizer: ImageTokenizer
    image_size: int
    fit: Fit
    batch_size: int
    keep_images: bool
    max_pixels: int
    tally: Tally

    def samples(self, url: str, *, pool: Executor) -> Iterator[Sample]:
        """The samples of a shard with their codes; broken ones are counted and left out."""
        whole = whole_samples(url, self.tally)
        while batch := list(islice(whole, self.batch_size)):
            read = []
            for sample, pixels in zip(batch, pool.map(self._pixels, batch), strict=True):
                if isinstance(pixels, Broken):
                    self.tally.add_broken(pixels)
                else:
                    self.tally.good += 1
                    read.append((sample, pixels))
            if read:
                codes = self._encode([pixels for _, pixels in read])
                for (sample, _), row in zip(read, codes, strict=True):
                    kept = {
                        name: value
                        for name, value in sample.items()
                        if self.keep_images or name not in PICTURES
                    }
                    yield {**kept, CODES: encode_array(row)}

    def _pixels(self, sample: Sample) -> Tensor | Broken:
        try:
            image = field_image(sample, max_pixels=self.max_pixels)
            return to_pixels(image, self.image_size, fit=self.fit)
        except BROKEN_CONTENT as error:
            return Broken(sample["__url__"], sample["__key__"], one_line(error))

    @torch.inference_mode()
    def _encode(self, pixels: list[Tensor]) -> np.ndarray:
        """N pictures [3, H, W] -> [N, K], in the smallest unsigned type that holds all codes."""
        parameter = next(self.tokenizer.parameters(), None)
        device = parameter.device if parameter is not None else "cpu"
        codes = self.tokenizer.encode(torch.stack(pixels).to(device)).cpu().numpy()
        return codes.astype(np.uint16 if self.tokenizer.codebook_size <= 1 << 16 else np.uint32)


def _fingerprint(folder: Path) -> str:
    """sha256 over the files of an image tokenizer, so that codes of two are never mixed."""
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    if not files:
        raise ValueError(f"image tokenizer {folder}: no config.json and weights there")
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


if __name__ == "__main__":
    command_line.run(main)
