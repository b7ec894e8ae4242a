"""How fast sampling and training are, beside plain code and beside what the machine allows.

python -m eval.speed --config configs/eval/speed.yaml
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

from data_pipelines.sources.word_problems import read_gsm8k
from eval.provenance import describe_hardware
from eval.speed.measuring import Result, growth_of, measure
from eval.speed.report import chart, table, write
from eval.speed.works import PARTS, SHAPES, Bench, Part
from mmdlm.cli import recipe as command_line
from mmdlm.models.costs import Machine


def main(
    *,
    out: Path = Path("runs/eval/speed.json"),
    parts: list[Part] | None = None,
    shape: str = "S",
    repeats: int = 5,
    threads: int | None = None,
    gsm8k: Path | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Time exact and cached sampling and the training step beside plain code of published systems.

    Weights are random: what is measured does not depend on them. Runs of the variants of a row take
    turns; a row shows medians, and the least and the largest ratio of runs that stood side by side.
    So does what the machine reaches, of which follows what a row takes at least.

    Args:
        out: JSON file for the result; a bar chart goes beside it, with .png.
        parts: Rows to measure; default: all, `packing` where --gsm8k is given.
        shape: tiny, S, M, L or XL: width, layers and inner width of the Transformer.
        repeats: Runs of each variant, after one that does not count.
        threads: Of torch, fixed for all; default: as torch has it.
        gsm8k: JSON lines with `question` and `answer`, whose lengths the part `packing` takes.
        device: "cpu" or "cuda".
        dtype: Of the weights.
    """
    if shape not in SHAPES:
        raise ValueError(f"--shape {shape!r} is not one of {', '.join(SHAPES)}")
    if repeats < 1:
        raise ValueError(f"--repeats {repeats} is too few; give 1 or more")
    if parts is None:
        parts = [part for part in PARTS if part != "packing" or gsm8k is not None]
    if "packing" in parts and gsm8k is None:
        raise ValueError("--parts packing needs --gsm8k FILE; give it, or leave the part out")
    if gsm8k is not None:
        read_gsm8k(gsm8k)  # a file that cannot be read is found before an hour is spent
    if threads is not None:
        torch.set_num_threads(threads)
    bench = Bench(shape, torch.device(device), getattr(torch, dtype), repeats)
    results: list[Result] = []
    machines: dict[str, Machine] = {}
    for part in parts:
        for work in bench.works(part, gsm8k):
            found, machine = measure(bench, work)
            results += found
            machines[work.name] = machine
            print(table(found, title=work.name))
            print(
                f"  {machine.flops / 1e9:,.0f} GFLOP/s in matrix products "
                f"({machine.fastest_flops / 1e9:,.0f} by the fastest kernel), "
                f"{machine.bandwidth / 1e9:.1f} GB/s in copies, {torch.get_num_threads()} threads",
                flush=True,
            )
        growth = growth_of(bench) if part == "growth" else []
        for one in growth:
            print(one.line(), flush=True)
        report = {
            "results": [asdict(one) for one in results],
            "growth": [{**asdict(one), "exponent": one.exponent} for one in growth],
            "machine": {name: asdict(measured) for name, measured in machines.items()},
            "shape": {"name": shape, "dtype": dtype, "repeats": repeats},
            "hardware": describe_hardware(bench.device),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write(report, out)  # after each part: nothing is lost
        if results:
            chart(results, out.with_suffix(".png"))
    print(out, *([out.with_suffix(".png")] if results else []), sep="\n")


if __name__ == "__main__":
    command_line.run(main)
