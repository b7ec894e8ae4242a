"""Time, memory and growth of the variants of a row, beside what the machine reaches."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from eval.loading import memory
from eval.speed.works import PLAIN, SPECIAL, Bench, Work
from mmdlm.models.costs import Machine, synchronize


@dataclass(frozen=True)
class Result:
    """What was measured of a variant; seconds of each run, and bytes beyond what was there."""

    work: str
    variant: str
    seconds: list[float]
    per_second: float
    unit: str
    times_plain: float
    spread: tuple[float, float]
    target: float | None
    share_of_floor: float | None
    same_as_plain: bool | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Growth:
    """How the seconds of a variant grow with one quantity; one run of each."""

    quantity: str
    variant: str
    values: list[int]
    seconds: list[float]

    @property
    def exponent(self) -> float:
        """Slope of log seconds over log quantity, by least squares."""
        x = [math.log(one) for one in self.values]
        y = [math.log(one) for one in self.seconds]
        mx, my = sum(x) / len(x), sum(y) / len(y)
        return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
            (a - mx) ** 2 for a in x
        )

    def line(self) -> str:
        """For the terminal."""
        pairs = ", ".join(
            f"{value:,}: {seconds:.2f} s"
            for value, seconds in zip(self.values, self.seconds, strict=True)
        )
        return f"{self.variant} over {self.quantity}: {pairs} (exponent {self.exponent:.2f})"


def measure(bench: Bench, work: Work) -> tuple[list[Result], Machine]:
    """Run each variant in turn, again and again, and measure the machine beside them."""
    names = list(work.variants)
    outputs = {name: work.variants[name].run() for name in names}  # not counted
    same = {
        name: work.same(outputs[name], outputs[PLAIN])
        for name, variant in work.variants.items()
        if variant.exact
    }
    for name, equal in same.items():
        if not equal:
            raise ValueError(f"{work.name}: {name} gives another result than {PLAIN}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0)
    machines = []
    for _ in tqdm(range(bench.repeats), desc=work.name, unit="round", leave=False):
        machines.append(Machine.measure(bench.device, bench.dtype))
        for name in names:
            gc.collect()
            if work.model is not None:
                work.model.zero_grad(set_to_none=True)
            before = reset_peak(bench.device)
            began = time.perf_counter()
            work.variants[name].run()
            synchronize(bench.device)
            seconds[name].append(time.perf_counter() - began)
            peaks[name] = max(peaks[name], peak(bench.device) - before)
    first = work.amount_of(PLAIN)
    found = []
    for name, variant in work.variants.items():
        amount = work.amount_of(name)
        ratios = [
            (a / first) / (b / amount) for a, b in zip(seconds[PLAIN], seconds[name], strict=True)
        ]
        middle, floor = median(seconds[name]), variant.floor
        found.append(
            Result(
                work=work.name,
                variant=name,
                seconds=[round(one, 5) for one in seconds[name]],
                per_second=amount / middle,
                unit=work.unit,
                times_plain=median(ratios),
                spread=(min(ratios), max(ratios)),
                target=variant.target,
                share_of_floor=None
                if floor is None
                else median(
                    machine.seconds(floor) / one
                    for machine, one in zip(machines, seconds[name], strict=True)
                ),
                same_as_plain=same.get(name),
                peak_bytes=peaks[name] if work.model is not None else None,
            )
        )
    return found, Machine.medians(machines)


def growth_of(bench: Bench) -> list[Growth]:
    """Seconds of an answer over length, rows, steps and vocabulary, one varied at a time."""
    found = []
    usual = {"prompt": 128, "rows": 1, "steps": 16, "vocabulary": bench.ids + SPECIAL}
    for name, values in (
        ("prompt", (128, 256, 512, 1024)),
        ("rows", (1, 2, 4, 8)),
        ("steps", (8, 16, 32, 64)),
        ("vocabulary", (8192, 24_576, 65_536, 134_656)),
    ):
        seconds: dict[str, list[float]] = {}
        for value in tqdm(values, desc=f"growth with {name}", leave=False):
            given = {**usual, name: value}
            work = bench.text(
                bench.model(text=given["vocabulary"] - SPECIAL),
                (None, None, None),
                prompt=given["prompt"],
                steps=given["steps"],
                rows=given["rows"],
            )
            work.variants["exact"].run()  # not counted: layers are packed
            for variant in (PLAIN, "exact", "dual cache"):
                began = time.perf_counter()
                work.variants[variant].run()
                synchronize(bench.device)
                seconds.setdefault(variant, []).append(time.perf_counter() - began)
        for variant, measured in seconds.items():
            found.append(Growth(name, variant, list(values), measured))
    return found


def reset_peak(device: torch.device) -> int:
    """Begin to watch for the highest memory -> bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark is what is in use
    return memory()["VmRSS"]


def peak(device: torch.device) -> int:
    """Highest memory in bytes since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory()["VmHWM"]
