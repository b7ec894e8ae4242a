"""The table, the chart and the file of the speed benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Any

from eval.speed.measuring import Result
from eval.speed.works import PLAIN
from mmdlm.atomic_files import atomic_write


def write(report: dict[str, Any], path: Path) -> None:
    """As JSON, whole or not at all."""
    content = (json.dumps(report, indent=2) + "\n").encode()
    atomic_write(path, lambda file: file.write(content))


def table(results: list[Result], *, title: str) -> str:
    """One work: each variant beside the plain one and beside the floor."""
    lines = [f"\n{title}"]
    for one in results:
        low, high = one.spread
        parts = [
            f"  {one.variant:14}{median(one.seconds):9.3f} s{one.per_second:11,.1f} {one.unit}/s"
        ]
        if one.variant != PLAIN:
            parts.append(f"{one.times_plain:6.2f} x plain ({low:.2f} to {high:.2f})")
        if one.target is not None:
            missed = "" if one.times_plain >= one.target else ", missed"
            parts.append(f"aim {one.target} x{missed}")
        if one.share_of_floor is not None:
            parts.append(f"{one.share_of_floor:.0%} of the floor's speed")
        if one.same_as_plain:
            parts.append("the same result")
        if one.peak_bytes is not None:
            parts.append(f"{one.peak_bytes / 1e9:.2f} GB above the weights")
        lines.append(", ".join(parts))
    return "\n".join(lines)


def chart(results: list[Result], path: Path) -> None:
    """Bars of how many times as fast as plain each variant is, with the spread and the aim."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    shown = [one for one in results if one.variant != PLAIN]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.62 * len(shown)), layout="constrained")
    places = range(len(shown), 0, -1)
    values = [one.times_plain for one in shown]
    error = [
        [one.times_plain - one.spread[0] for one in shown],
        [one.spread[1] - one.times_plain for one in shown],
    ]
    axes.barh(places, values, xerr=error, height=0.6, color="#4878a8", ecolor="#22211f", capsize=2)
    for place, one in zip(places, shown, strict=True):
        if one.target is not None:
            axes.plot([one.target] * 2, [place - 0.4, place + 0.4], color="#b3402e", linewidth=2)
        axes.annotate(f" {one.times_plain:.1f} x", (one.spread[1], place), va="center", fontsize=8)
    axes.axvline(1, color="#8d8a84", linewidth=1)
    labels = ["\n".join([one.variant, *wrap(one.work, 48)]) for one in shown]
    axes.set_yticks(list(places), labels)
    axes.tick_params(axis="y", labelsize=6)
    widest = max(one.spread[1] for one in shown)
    axes.set(xlabel="times as fast as plain code; red: the aim", xlim=(0, 1.1 * widest))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
