"""Job: image shards -> code shards, so that training never runs the image tokenizer.

    accelerate launch -m data_pipelines.tokenize_images --shards data/emoji/train \\
        --tokenizer runs/emoji/image_tokenizer --out data/emoji/train_codes

Each process takes every n-th shard. A shard is written beside and then renamed, and the same
command goes on after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_pipelines import command_line
from data_pipelines.shards import (
    BrokenShard,
    Sample,
    expand_urls,
    read_shard,
    write_json,
    write_shard,
)
from data_pipelines.source import BROKEN_CONTENT, PICTURES, encode_array, field_image
from data_pipelines.stream import Broken, Reader, Tally, one_line
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
        device: Where to compute; default: this process's GPU, else the CPU.
        threads: Threads that decode pictures.
    """
    if batch_size < 1 or threads < 1:
        raise ValueError(f"batch_size {batch_size} and threads {threads} must be 1 or more")
    process = Reader(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    urls = expand_urls(shards)
    targets = [out / name for name in code_names(urls)]
    record: dict[str, object] = {
        "tokenizer": _fingerprint(tokenizer),
        "image_size": image_size,
        "fit": fit,
        "keep_images": keep_images,
    }
    _check_record(out / RECORD, record, write=process.number == 0)
    own = list(zip(urls, targets, strict=True))[process.number :: process.count]
    if all(target.is_file() for _, target in own):
        print(f"{out}: already written")
        return
    if device is None:
        local = os.environ.get("LOCAL_RANK", "0")
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    model = load_image_tokenizer(tokenizer).to(device)
    encoder = Encoder(
        model, image_size or model.image_size, fit, batch_size, keep_images, Tally(max_broken)
    )
    # Shards that are done count as done in the bar, so that its time left is right.
    todo = [(url, target) for url, target in own if not target.is_file()]
    pictures = 0
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(
            total=len(own),
            initial=len(own) - len(todo),
            desc="encoding",
            unit=" shards",
            position=process.number,
        ) as bar,
    ):
        for url, target in todo:
            start = time.monotonic()
            count = write_shard(target, encoder.samples(url, pool=pool))
            pictures += count
            rate = count / (time.monotonic() - start)
            bar.set_postfix_str(f"{pictures} pictures, {rate:.0f} a second")
            bar.update()
    broken = encoder.tally.broken
    skipped = f", {broken} skipped: {encoder.tally.summary()}" if broken else ""
    print(f"{out}: {pictures} pictures in {len(todo)} shards{skipped}")


@dataclass(frozen=True)
class Encoder:
    """Samples with pictures -> samples with codes, `batch_size` at a time."""

    tokenizer: ImageTokenizer
    image_size: int
    fit: Fit
    batch_size: int
    keep_images: bool
    tally: Tally

    def samples(self, url: str, *, pool: Executor) -> Iterator[Sample]:
        """The samples of a shard with their codes; broken ones are counted and left out."""
        whole = _whole_samples(url, self.tally)
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
            return to_pixels(field_image(sample), self.image_size, fit=self.fit)
        except BROKEN_CONTENT as error:
            return Broken(sample["__url__"], sample["__key__"], one_line(error))

    @torch.inference_mode()
    def _encode(self, pixels: list[Tensor]) -> np.ndarray:
        """N pictures [3, H, W] -> [N, K], in the smallest unsigned type that holds all codes."""
        parameter = next(self.tokenizer.parameters(), None)
        device = parameter.device if parameter is not None else "cpu"
        codes = self.tokenizer.encode(torch.stack(pixels).to(device)).cpu().numpy()
        return codes.astype(np.uint16 if self.tokenizer.codebook_size <= 1 << 16 else np.uint32)


def _whole_samples(url: str, tally: Tally) -> Iterator[Sample]:
    try:
        yield from read_shard(url)
    except BrokenShard as error:
        tally.add_broken(Broken(url, None, str(error)))


def code_names(urls: list[str]) -> list[str]:
    """File names for code shards: those of the image shards, numbered where two are the same."""
    names = [os.path.basename(url.split("?")[0].rstrip("/")) for url in urls]
    if len(set(names)) < len(names) or any(url.startswith("pipe:") for url in urls):
        return [f"{number:06d}.tar" for number in range(len(urls))]
    return [name.removesuffix(".gz").removesuffix(".tar") + ".tar" for name in names]


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


def _check_record(path: Path, record: dict[str, object], *, write: bool) -> None:
    """ValueError where the folder has codes of another tokenizer or other settings."""
    if path.is_file():
        before = json.loads(path.read_text())
        differing = [name for name in record if before.get(name) != record[name]]
        if differing:
            raise ValueError(
                f"{path.parent} holds codes made with another {' and '.join(differing)}; name "
                "another --out or delete the folder"
            )
    elif write:
        write_json(path, record)


if __name__ == "__main__":
    command_line.run(main)
