"""Benchmark: the memory and the time that loading takes, for a checkpoint of the published size.

python -m eval.loading --config configs/eval/loading.yaml
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from mmdlm.atomic_files import atomic_write
from mmdlm.cli import recipe as command_line
from mmdlm.models.checkpoints.checkpoint import INDEX
from mmdlm.models.checkpoints.stored_tensor import DTYPES
from mmdlm.models.configuration import read_config
from mmdlm.models.families.auto import family_named
from mmdlm.models.modeling import MmdlmForMaskedDiffusion

STATUS = Path("/proc/self/status")
PAGE = 4096  # bytes
STD = 0.02  # of the random weights
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model in LLaDA's layout."""

    width: int = 4096
    layers: int = 32
    heads: int = 32
    inner: int = 12288
    vocabulary: int = 126464

    def config(self, stored: str) -> dict[str, Any]:
        """Its config.json."""
        with torch.device("meta"):
            fields = read_config(
                {
                    "model_type": "llada",
                    "d_model": self.width,
                    "n_layers": self.layers,
                    "n_heads": self.heads,
                    "n_kv_heads": self.heads,
                    "mlp_hidden_size": self.inner,
                    "max_sequence_length": 4096,
                    "rope_theta": 500000.0,
                    "vocab_size": self.vocabulary,
                    "embedding_size": self.vocabulary,
                }
            ).to_dict()
        return {**family_named("llada").published_config(fields), "torch_dtype": stored}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return published names and shapes."""
        with torch.device("meta"):
            model = MmdlmForMaskedDiffusion(read_config(self.config("float32")))
        theirs = family_named("llada").weights.reversed
        return {str(theirs(k)): tuple(v.shape) for k, v in model.state_dict().items()}


def main(
    out: Path = Path("runs/eval/loading.json"),
    *,
    folder: Path = Path("runs/eval/loading_checkpoint"),
    shape: Shape = Shape(),
    stored: Dtype = "bfloat16",
    dtype: Dtype = "bfloat16",
    shard_gb: float = 5.0,
    bound: float = 1.25,
    keep: bool = False,
    seed: int = 0,
) -> None:
    """Write a random checkpoint, load it in a fresh process, and measure what that process holds.

    Prints the numbers and writes the JSON of --out. The peak of resident memory counts the pages of
    files that are mapped; that of anonymous memory does not, and what is mapped can be dropped by
    the system at any time.

    Args:
        out: JSON file for the result.
        folder: Folder for the checkpoint, which must not exist; it is removed at the end.
        shape: Sizes of the model, in LLaDA's layout; default: 8 billion parameters.
        stored: Data type of the files.
        dtype: Data type of the model that they are loaded into.
        shard_gb: Largest file, in 10^9 bytes.
        bound: Peak of resident memory that is allowed, as a multiple of the weights in --dtype.
        keep: Leave the checkpoint where it is.
        seed: Of the random weights.
    """
    if not STATUS.is_file():
        raise ValueError(f"there is no {STATUS}, by which memory is measured; run it on Linux")
    if not shard_gb > 0 or not bound > 0:
        raise ValueError(f"--shard_gb {shard_gb} and --bound {bound} must be above zero")
    if folder.exists():
        raise ValueError(f"--folder {folder} exists; name another, or remove it")
    began = time.perf_counter()
    parameters = sum(math.prod(one) for one in shape.tensors().values())
    weights = parameters * getattr(torch, dtype).itemsize
    try:
        files = write_checkpoint(folder, shape, stored=stored, shard_gb=shard_gb, seed=seed)
        written = time.perf_counter() - began
        measured = measure_in_fresh_process(folder, dtype)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    growth = measured["peak_resident_bytes"] - measured["before_resident_bytes"]
    result = {
        "parameters": parameters,
        "weights_bytes": weights,
        "bound_bytes": round(bound * weights),
        "peak_over_weights": round(measured["peak_resident_bytes"] / weights, 4),
        "peak_growth_over_weights": round(growth / weights, 4),
        "peak_anonymous_over_weights": round(measured["peak_anonymous_bytes"] / weights, 4),
        "within_bound": measured["peak_resident_bytes"] <= bound * weights,
        **measured,
    }
    report = {
        "results": result,
        "settings": {
            "shape": asdict(shape),
            "stored": stored,
            "dtype": dtype,
            "shard_gb": shard_gb,
            "bound": bound,
            "seed": seed,
        },
        "files": files,
        "write_seconds": round(written, 1),
        "hardware": _describe_hardware(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(table(report))
    text = json.dumps(report, indent=2) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, lambda file: _put(text, file))
    print("", out, sep="\n")


def table(report: dict[str, Any]) -> str:
    """Return the numbers of a report, a line each."""
    result, settings = report["results"], report["settings"]
    says = "within" if result["within_bound"] else "OVER"
    lines = {
        "parameters": f"{result['parameters'] / 1e9:.3f} billion",
        f"weights in {settings['dtype']}": _gb(result["weights_bytes"]),
        f"files in {settings['stored']}": f"{_gb(sum(report['files'].values()))}, "
        f"{len(report['files'])} of them",
        "before loading, resident": _gb(result["before_resident_bytes"]),
        "peak, resident": f"{_gb(result['peak_resident_bytes'])}, "
        f"{result['peak_over_weights']:.2f} x the weights, {says} {settings['bound']} x",
        "of which loading": f"{result['peak_growth_over_weights']:.2f} x the weights",
        "peak, anonymous": f"{_gb(result['peak_anonymous_bytes'])}, "
        f"{result['peak_anonymous_over_weights']:.2f} x the weights",
        "loading": f"{result['load_seconds']:.1f} s",
        "reading every page after that": f"{result['touch_seconds']:.1f} s",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


# ---- the checkpoint ------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path, shape: Shape, *, stored: str, shard_gb: float, seed: int
) -> dict[str, int]:
    """Random weights in LLaDA's layout, tensor by tensor -> size of each file in bytes.

    Raises ValueError where the disk has not enough room.
    """
    dtype = getattr(torch, stored)
    shards = list(_shards(shape.tensors(), int(shard_gb * 1e9), dtype.itemsize))
    size = sum(math.prod(one) * dtype.itemsize for shard in shards for one in shard.values())
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < 1.02 * size:
        raise ValueError(
            f"--folder {folder}: the checkpoint takes {_gb(size)}, but {_gb(free)} are free; name "
            "a folder of another disk, or a smaller --shape"
        )
    generator = torch.Generator().manual_seed(seed)
    where: dict[str, str] = {}
    with tqdm(total=size, desc="writing", unit="B", unit_scale=True) as bar:
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with open(folder / name, "wb") as file:
                file.write(_header(shard, dtype))
                for one in shard.values():
                    tensor = _random(one, dtype, generator)
                    file.write(tensor.flatten().view(torch.uint8).numpy().data)
                    bar.update(tensor.nbytes)
                _forget(file)
            where |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config(stored), indent=2))
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def _shards(
    tensors: dict[str, tuple[int, ...]], largest: int, itemsize: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors in order, in files of at most `largest` bytes except for single tensors."""
    shard: dict[str, tuple[int, ...]] = {}
    held = 0
    for name, one in tensors.items():
        size = math.prod(one) * itemsize
        if shard and held + size > largest:
            yield shard
            shard, held = {}, 0
        shard[name] = one
        held += size
    yield shard


def _header(tensors: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Return the beginning of a safetensors file: its length, then names, shapes and places."""
    kind = next(name for name, one in DTYPES.items() if one == dtype)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in tensors.items():
        stop = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    content = json.dumps(entries).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Matrices are normal, norms are one."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(std=STD, generator=generator)


def _forget(file: BinaryIO) -> None:
    """Wait for the disk, and let the system drop what it remembers of the file, as after a boot."""
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- the measurement -----------------------------------------------------------------------------


def measure_in_fresh_process(folder: Path, dtype: str) -> dict[str, float]:
    """Load in a process that has done nothing else; ValueError where it does not survive that."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(folder, dtype, theirs))
    process.start()
    theirs.close()
    try:
        result: dict[str, float] = ours.recv()
    except EOFError as error:
        process.join()
        raise ValueError(
            f"loading ended with status {process.exitcode} (-9: the system stopped it, as memory "
            "ran out); free memory, or take a smaller --shape"
        ) from error
    process.join()
    return result


def _measure(folder: Path, dtype: str, connection: Connection) -> None:
    """Load, read every page of the weights, and send what that took."""
    transformers_logging.disable_progress_bar()
    before = memory()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with _peak_anonymous() as peak:
        start = time.perf_counter()
        with tqdm(total=size, desc="loading", unit="B", unit_scale=True) as bar:

            def advance(count: int) -> None:
                bar.update(count)

            model = MmdlmForMaskedDiffusion.from_pretrained(
                folder, dtype=getattr(torch, dtype), read=advance
            )
        loaded = time.perf_counter()
        for tensor in tqdm(model.state_dict().values(), desc="reading", unit=" tensors"):
            _touch(tensor)
        touched = time.perf_counter()
    connection.send(
        {
            "before_resident_bytes": before["VmRSS"],
            "peak_resident_bytes": memory()["VmHWM"],
            "peak_anonymous_bytes": max(peak),
            "load_seconds": round(loaded - start, 2),
            "touch_seconds": round(touched - loaded, 2),
        }
    )


def _touch(tensor: Tensor) -> int:
    """Read one byte of every page, so that mapped files are in memory as they are in use."""
    return int(tensor.flatten().view(torch.uint8)[::PAGE].sum())


@contextmanager
def _peak_anonymous(*, interval: float = 0.005) -> Iterator[list[int]]:
    """Ask for the anonymous memory of this process every few milliseconds -> the answers."""
    seen, done = [memory()["RssAnon"]], threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            seen[0] = max(seen[0], memory()["RssAnon"])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def memory() -> dict[str, int]:
    """Bytes: VmRSS now, VmHWM at its highest, RssAnon not backed by files."""
    lines = (line.split(":") for line in STATUS.read_text().splitlines())
    values = {name: value.split() for name, value in lines if name in ("VmRSS", "VmHWM", "RssAnon")}
    return {name: int(value[0]) * 1024 for name, value in values.items()}


# ---- small parts ---------------------------------------------------------------------------------


def _describe_hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _put(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


if __name__ == "__main__":
    command_line.run(main)
