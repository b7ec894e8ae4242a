r"""Job: image shards -> code shards, so that training never runs the image tokenizer.

    accelerate launch -m data_pipelines.tokenize_images --shards data/emoji/train \
        --tokenizer runs/emoji/image_tokenizer --out data/emoji/train_codes

Each process takes every n-th shard. A shard is written beside and then renamed, and the same
command goes on after an interruption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.jobs.report import Report
from data_pipelines.jobs.shard_job import (
    Rewriter,
    batched,
    needs_no_image,
    own_device,
    rewrite_shards,
    sample_name,
    whole_samples,
)
from data_pipelines.jobs.sole_writer import sole_writer
from data_pipelines.shards.sample_stats import one_line
from data_pipelines.shards.shards import Sample, expand_urls
from data_pipelines.sources.source import BROKEN_CONTENT, encode_array, field_names
from data_pipelines.sources.vision_samples import IMAGE_FIELD, numbered
from mmdlm.cli import recipe as command_line
from mmdlm.vision.image_files import MAX_PIXELS, open_image
from mmdlm.vision.pixels import Fit, to_pixels
from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from mmdlm.vision.tokenizers.base import ImageTokenizer

CODES = "codes.npy"
RECORD = "codes.json"  # which tokenizer the codes are of


@sole_writer
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
    allow_pipe: bool = False,
    device: str | None = None,
    threads: int = 4,
) -> None:
    """Replace the images of shards by their codes; texts and all else stay.

    The codes of one image are codes.npy; of several (0.png, 1.png ...), 0.codes.npy, 1.codes.npy.
    Conversations without an image stay as they are.

    Args:
        shards: Folder, path, glob, brace range or URL of image shards, or several of them.
        tokenizer: Folder of the image tokenizer (config.json, model.safetensors).
        out: Folder for the code shards, which keep the names of their image shards.
        batch_size: Images that are encoded at once.
        image_size: Edge in pixels to which images are scaled; default: the tokenizer's own.
        fit: How an image that is not square becomes so: crop, pad with white, or stretch.
        keep_images: Keep the images beside their codes.
        max_broken: Share of broken samples that are left out and listed; more stop the job.
        max_pixels: Images of more pixels are not decoded, and count as broken.
        allow_pipe: Run the commands of shards that are given as pipe:COMMAND.
        device: Where to compute; default: this process's GPU, else the CPU.
        threads: Threads that decode images.
    """
    if batch_size < 1 or threads < 1:
        raise ValueError(f"batch_size {batch_size} and threads {threads} must be 1 or more")

    def build() -> Encoder:
        model = load_image_tokenizer(tokenizer).to(device or own_device())
        size = image_size or model.image_size
        return Encoder(model, size, fit, batch_size, keep_images, max_pixels)

    # A path that is wrong is said before the tokenizer is read.
    expand_urls(shards, allow_pipe=allow_pipe)
    record: dict[str, object] = {
        "tokenizer": _fingerprint(tokenizer),
        "image_size": image_size,
        "fit": fit,
        "keep_images": keep_images,
    }
    rewrite_shards(
        shards,
        out,
        record=(RECORD, record),
        build=build,
        threads=threads,
        max_broken=max_broken,
        allow_pipe=allow_pipe,
    )


@dataclass(frozen=True)
class Encoder(Rewriter):
    """Samples with images -> samples with codes, `batch_size` at a time."""

    tokenizer: ImageTokenizer
    image_size: int
    fit: Fit
    batch_size: int
    keep_images: bool
    max_pixels: int

    def samples(self, url: str, report: Report, *, pool: Executor) -> Iterator[Sample]:
        """Yield the samples of a shard with their codes; broken ones are counted and left out."""
        for batch in batched(whole_samples(url), self.batch_size):
            report.read += len(batch)
            read = list(self._read(batch, report, pool=pool))
            every = [pixels for _, images in read for pixels in images.values()]
            codes = chain.from_iterable(map(self._encode, batched(iter(every), self.batch_size)))
            for sample, images in read:
                kept = {
                    name: value
                    for name, value in sample.items()
                    if self.keep_images or not IMAGE_FIELD.fullmatch(name)
                }
                yield {**kept, **{codes_field(name): encode_array(next(codes)) for name in images}}

    def _read(
        self, batch: list[Sample], report: Report, *, pool: Executor
    ) -> Iterator[tuple[Sample, dict[str, Tensor]]]:
        """Yield usable samples, each with the pixels of its images by their fields."""
        for sample, images in zip(batch, pool.map(self._images, batch), strict=True):
            if isinstance(images, Exception):
                report.add_broken(sample_name(sample), one_line(images))
            else:
                yield sample, images

    def _images(self, sample: Sample) -> dict[str, Tensor] | Exception:
        try:
            names = numbered(sample, IMAGE_FIELD)
            if not names and not needs_no_image(sample):
                raise ValueError(f"no image among its fields ({', '.join(field_names(sample))})")
            return {name: self._pixels(sample[name]) for name in names}
        except BROKEN_CONTENT as error:
            return error

    def _pixels(self, image: bytes) -> Tensor:
        return to_pixels(
            open_image(image, max_pixels=self.max_pixels), self.image_size, fit=self.fit
        )

    @torch.inference_mode()
    def _encode(self, pixels: list[Tensor]) -> np.ndarray:
        """N images [3, H, W] -> [N, K], in the smallest unsigned type that holds all codes."""
        parameter = next(self.tokenizer.parameters(), None)
        device = parameter.device if parameter is not None else "cpu"
        codes = self.tokenizer.encode(torch.stack(pixels).to(device)).cpu().numpy()
        return codes.astype(np.uint16 if self.tokenizer.codebook_size <= 1 << 16 else np.uint32)


def codes_field(image: str) -> str:
    """Return the field of the codes of an image: codes.npy, with its number where it has one."""
    number = IMAGE_FIELD.fullmatch(image)
    assert number is not None
    return f"{number[1]}.{CODES}" if number[1] else CODES


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
