"""What jobs have in common that turn shards into shards: they share, go on, and count."""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from data_pipelines.jobs.origin import file_state, is_same_file, of_unknown
from data_pipelines.jobs.report import Report
from data_pipelines.shards.shards import (
    BrokenShard,
    Sample,
    expand_urls,
    missing_samples,
    read_json,
    read_shard,
    stats_of,
    write_json,
    write_shard,
)
from data_pipelines.shards.stream import Reader
from data_pipelines.sources.messages import SAID
from data_pipelines.sources.text_files import parsed
from mmdlm.templates.conversation import IMAGE

T = TypeVar("T")


class Rewriter(ABC):
    """Samples of a shard -> samples of another; what is broken is counted and left out."""

    @abstractmethod
    def samples(self, url: str, report: Report, *, pool: Executor) -> Iterator[Sample]:
        """Yield the new samples of a shard; `pool` decodes images.

        Raises BrokenShard for a damaged one.
        """


def rewrite_shards(
    shards: str | list[str],
    out: Path,
    *,
    record: tuple[str, dict[str, object]],
    build: Callable[[], Rewriter],
    threads: int,
    max_broken: float,
    allow_pipe: bool = False,
) -> None:
    """Rewrite each shard into a shard of the same name in `out`, beside and then renamed.

    Each process of `accelerate launch` takes every n-th shard. What is there already stays: beside
    each shard a NAME_stats.json says of what it was made and what became of its samples.

    Args:
        shards: Paths or urls, with braces for ranges.
        out: Folder of the new shards.
        record: File name and content of what all shards of `out` have in common; the process that
            finishes last adds what became of all samples.
        build: Makes the rewriter, where there is anything left to do.
        threads: Of the pool that decodes images.
        max_broken: Share of samples that may be left out as broken.
        allow_pipe: Whether `pipe:` commands among the urls may run.

    Raises:
        ValueError: Where the folder was written with another record, or of shards that have changed
            since; and, once the others are done, for shards that are damaged or without any sample.
    """
    process = Reader(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    urls = expand_urls(shards, allow_pipe=allow_pipe)
    pairs = list(zip(urls, (out / name for name in shard_names(urls)), strict=True))
    index = out / record[0]
    _check_record(index, record[1], write=process.number == 0)
    own = pairs[process.number :: process.count]
    todo = [(url, target) for url, target in own if not _is_written(url, target)]
    new = {target for _, target in todo}
    total = _total([target for _, target in own if target not in new], max_broken)
    if process.number == 0:
        _name_leftover(out, [target for _, target in pairs])
    if todo:
        _rewrite_all(build(), todo, total, done=len(own) - len(todo), threads=threads)
    else:
        states = [read_json(stats_of(target)).get("given") or {} for _, target in own]
        print(f"{out}: already written{of_unknown(states) if own else ''}")
    if all(stats_of(target).is_file() for _, target in pairs):
        whole = _total([target for _, target in pairs], max_broken)
        content = {**record[1], "shards": len(pairs), "report": whole.to_dict()}
        write_json(index, content, part=f".{process.number}.part")


def _rewrite_all(
    rewriter: Rewriter, todo: list[tuple[str, Path]], total: Report, *, done: int, threads: int
) -> None:
    """Shards one after another.

    Args:
        rewriter: Makes the samples of each shard.
        todo: (url, path to write) of each shard.
        total: What became of the samples of those that are done.
        done: Their number, so that the time left in the bar is right.
        threads: Of the pool that decodes images.

    Raises:
        ValueError: Once the others are written, for those that are damaged.
    """
    damaged: list[str] = []
    process = int(os.environ.get("RANK", 0))
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(
            total=done + len(todo),
            initial=done,
            desc="encoding",
            unit=" shards",
            position=process,
        ) as bar,
    ):
        for url, target in todo:
            start = time.monotonic()
            report = Report(total.max_broken, before=total)
            try:
                _rewrite(rewriter, url, target, report, pool=pool)
            except BrokenShard as error:
                damaged.append(f"{url}: {error}")
            else:
                total += report
            rate = report.read / (time.monotonic() - start)
            bar.set_postfix_str(f"{total.written} samples, {rate:.0f} a second")
            bar.update()
    out, count = todo[0][1].parent, done + len(todo) - len(damaged)
    print(f"{out}: {total.written} samples in {count} shards\n{total}")
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {done + len(todo)} shards cannot be used and were not written: "
            f"{'; '.join(damaged)}. Write or copy them again, or leave them out of the list"
        )


def _name_leftover(out: Path, targets: list[Path]) -> None:
    """Say which shards of the folder are of shards that are no more."""
    known = set(targets)
    for target in sorted(out.glob("*.tar")):
        stats = stats_of(target)
        if target in known or not stats.is_file():
            continue
        source = str(read_json(stats).get("source"))
        if "://" not in source and not source.startswith("pipe:") and not Path(source).exists():
            print(
                f"{target} was made of {source}, which is gone; delete it unless its samples are "
                "still wanted",
                file=sys.stderr,
            )


def _rewrite(rewriter: Rewriter, url: str, target: Path, report: Report, *, pool: Executor) -> None:
    """One shard, and its stats. Raises BrokenShard, and leaves nothing, where it is not whole."""
    given = file_state(url)
    stats_of(target).unlink(missing_ok=True)

    def samples() -> Iterator[Sample]:
        yield from rewriter.samples(url, report, pool=pool)
        if report.read == report.broken:
            reasons = "; ".join(map(str, report.left_out)) or "it is empty"
            raise BrokenShard(f"none of its {report.read} samples can be used: {reasons}")

    report.written = write_shard(target, samples())
    write_json(stats_of(target), {"source": url, "given": given, "report": report.to_dict()})


def _is_written(url: str, target: Path) -> bool:
    """Return whether the shard is written; ValueError where it was made of another one."""
    stats = stats_of(target)
    if not target.is_file() or not stats.is_file():
        return False
    if not is_same_file(read_json(stats).get("given") or {}, url):
        raise ValueError(
            f"{url} has changed since {target} was made of it; delete {target} to make it again, "
            "or name another --out"
        )
    return True


def _total(shards: list[Path], max_broken: float) -> Report:
    """Return the counts of all samples of the written shards."""
    total = Report(max_broken)
    for shard in shards:
        stats = stats_of(shard)
        try:
            total += Report.from_dict(read_json(stats).get("report") or {})
        except ValueError as error:
            raise ValueError(f"{stats}: {error}") from None
    return total


def own_device() -> str:
    """Return this process's GPU, else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def whole_samples(url: str) -> Iterator[Sample]:
    """Yield the samples of a shard of which none may be missing.

    Raises BrokenShard where it is damaged, or holds fewer samples than an index beside it says.
    """
    count = 0
    try:
        for sample in read_shard(url):
            count += 1
            yield sample
    except BrokenShard as error:
        raise BrokenShard(f"{error}{missing_samples(url, count)}") from error
    if said := missing_samples(url, count):
        raise BrokenShard(f"it is another than its index says{said}")


def batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Items, `size` at a time."""
    while batch := list(islice(items, size)):
        yield batch


def needs_no_image(sample: Sample) -> bool:
    """Return whether a conversation, such as one of text only, mentions no image."""
    content = parsed(sample["json"]) if "json" in sample else None
    if not isinstance(content, dict) or not any(name in content for name in SAID):
        return False
    return IMAGE.encode() not in sample["json"]


def sample_name(sample: Sample) -> str:
    """Return a sample's name for reports."""
    return f"{sample['__url__']}, sample {sample['__key__']}"


def shard_names(urls: list[str]) -> list[str]:
    """File names for new shards: those of the old ones, numbered where two are the same."""
    names = [os.path.basename(url.split("?")[0].rstrip("/")) for url in urls]
    if len(set(names)) < len(names) or any(url.startswith("pipe:") for url in urls):
        return [f"{number:06d}.tar" for number in range(len(urls))]
    return [name.removesuffix(".gz").removesuffix(".tar") + ".tar" for name in names]


def _check_record(path: Path, record: dict[str, object], *, write: bool) -> None:
    """ValueError where the folder was written with other settings."""
    if path.is_file():
        before = read_json(path)
        differing = [name for name in record if before.get(name) != record[name]]
        if differing:
            raise ValueError(
                f"{path.parent} holds shards made with another {' and '.join(differing)}; name "
                "another --out or delete the folder"
            )
    elif write:
        write_json(path, record)
