"""What jobs have in common that turn shards into shards: they share, go on, and count."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from data_pipelines.shards import (
    BrokenShard,
    Sample,
    expand_urls,
    read_shard,
    write_json,
    write_shard,
)
from data_pipelines.stream import Broken, Reader, Tally


class Rewriter(ABC):
    """Samples of a shard -> samples of another; what is broken is counted and left out."""

    tally: Tally

    @abstractmethod
    def samples(self, url: str, *, pool: Executor) -> Iterator[Sample]:
        """The new samples of a shard; `pool` decodes pictures."""


def rewrite_shards(
    shards: str | list[str],
    out: Path,
    *,
    record: tuple[str, dict[str, object]],
    build: Callable[[], Rewriter],
    threads: int,
) -> None:
    """Rewrite each shard into a shard of the same name in `out`, beside and then renamed.

    Each process of `accelerate launch` takes every n-th shard. What is there already stays.

    record  file name and content of what all shards of `out` have in common; ValueError where the
            folder was written with another
    build   makes the rewriter, where there is anything left to do
    """
    process = Reader(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    urls = expand_urls(shards)
    targets = [out / name for name in shard_names(urls)]
    _check_record(out / record[0], record[1], write=process.number == 0)
    own = list(zip(urls, targets, strict=True))[process.number :: process.count]
    if all(target.is_file() for _, target in own):
        print(f"{out}: already written")
        return
    rewriter = build()
    # Shards that are done count as done in the bar, so that its time left is right.
    todo = [(url, target) for url, target in own if not target.is_file()]
    samples = 0
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
            count = write_shard(target, rewriter.samples(url, pool=pool))
            samples += count
            rate = count / (time.monotonic() - start)
            bar.set_postfix_str(f"{samples} samples, {rate:.0f} a second")
            bar.update()
    tally = rewriter.tally
    skipped = f", {tally.broken} skipped: {tally.summary()}" if tally.broken else ""
    print(f"{out}: {samples} samples in {len(todo)} shards{skipped}")


def own_device() -> str:
    """This process's GPU, else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def whole_samples(url: str, tally: Tally) -> Iterator[Sample]:
    """Samples of a shard; the rest of a damaged one is counted as broken."""
    try:
        yield from read_shard(url)
    except BrokenShard as error:
        tally.add_broken(Broken(url, None, str(error)))


def shard_names(urls: list[str]) -> list[str]:
    """File names for new shards: those of the old ones, numbered where two are the same."""
    names = [os.path.basename(url.split("?")[0].rstrip("/")) for url in urls]
    if len(set(names)) < len(names) or any(url.startswith("pipe:") for url in urls):
        return [f"{number:06d}.tar" for number in range(len(urls))]
    return [name.removesuffix(".gz").removesuffix(".tar") + ".tar" for name in names]


def _check_record(path: Path, record: dict[str, object], *, write: bool) -> None:
    """ValueError where the folder was written with other settings."""
    if path.is_file():
        before = json.loads(path.read_text())
        differing = [name for name in record if before.get(name) != record[name]]
        if differing:
            raise ValueError(
                f"{path.parent} holds shards made with another {' and '.join(differing)}; name "
                "another --out or delete the folder"
            )
    elif write:
        write_json(path, record)
