"""What reinforcement learning gained: runs before and after it in a table, and rewards as curves.

python -m eval.reinforcement --config configs/eval/reinforcement.yaml
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np

from mmdlm.atomic_files import atomic_write
from mmdlm.cli import recipe as command_line

SEED = "{seed}"  # stands in a path for the seeds of a comparison


@dataclass(frozen=True)
class Comparison:
    """Runs that differ only in their seed, and the model that they all started from.

    Attributes:
        name: What the table calls it.
        measure: Keys of a number in a benchmark's JSON, with slashes between them.
        before: The JSON of the model that the runs started from.
        after: The JSON of a run; `{seed}` stands for its seed.
        log: The log of a run, for its curve and what it cost; "": it has none.
        reward: Key of the log that is plotted.
        plot: Runs of one plot are drawn together; default: each comparison has its own.
        against: What the reward is plotted against.
    """

    name: str
    measure: str
    before: str
    after: str
    log: str = ""
    reward: str = "reward"
    plot: str = ""
    against: Literal["step", "minutes"] = "step"
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Outcome:
    """What came of a comparison: shares in [0, 1], one a seed; the others are means over seeds.

    Attributes:
        rollouts: Share of a run's time that went into sampling and rewards.
        scores: And into what the old policy and the reference hold of it.
    """

    name: str
    before: float
    after: tuple[float, ...]
    steps: float | None
    seconds: float | None
    rollouts: float | None
    scores: float | None

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.after)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds (n - 1); NaN for one of them."""
        return stdev(self.after) if len(self.after) > 1 else math.nan


def outcome(comparison: Comparison) -> Outcome | None:
    """Of the runs that are done; None where none is, or the start was not measured."""
    done = [seed for seed in comparison.seeds if _of(comparison.after, seed).is_file()]
    start = Path(comparison.before)
    if not done or not start.is_file():
        return None
    logs = [read_log(_of(comparison.log, seed)) for seed in done] if comparison.log else []
    return Outcome(
        name=comparison.name,
        before=number(start, comparison.measure),
        after=tuple(number(_of(comparison.after, seed), comparison.measure) for seed in done),
        steps=fmean(lines[-1]["step"] for lines in logs) if logs else None,
        seconds=fmean(_seconds(lines) for lines in logs) if logs else None,
        rollouts=_share(logs, "rollout_share"),
        scores=_share(logs, "scoring_share"),
    )


def _seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    return sum(line["seconds"] for line in lines)


def _share(logs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> float | None:
    """Return the mean share of the time of runs; with `logging_steps` 1 it is of the seconds."""
    if not logs or any(key not in lines[0] for lines in logs):
        return None
    return fmean(
        sum(line["seconds"] * line[key] for line in lines) / _seconds(lines) for lines in logs
    )


def number(path: Path, keys: str) -> float:
    """Read a number in a JSON file; ValueError that names the key that it lacks."""
    value: Any = json.loads(path.read_text())
    for key in keys.split("/"):
        if not isinstance(value, Mapping) or key not in value:
            has = ", ".join(value) if isinstance(value, Mapping) else repr(value)
            raise ValueError(f"{path} has no {key!r} of {keys!r}; it has {has}")
        value = value[key]
    return float(value)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a training log; ValueError where there are none."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name another log") from error
    if not lines:
        raise ValueError(f"{path} is empty; train first")
    return lines


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown; percent, with the deviation over seeds."""
    head = (
        "task",
        "before",
        "after",
        "gain, points",
        "seeds",
        "steps",
        "minutes each",
        "rollouts",
        "scores",
    )
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for one in outcomes:
        spread = "" if math.isnan(one.spread) else f" ± {100 * one.spread:.1f}"
        each = ", ".join(f"{100 * value:.1f}" for value in one.after)
        cells = (
            one.name,
            f"{100 * one.before:.1f} %",
            f"{100 * one.mean:.1f}{spread} % ({each})",
            f"{100 * (one.mean - one.before):+.1f}",
            len(one.after),
            "" if one.steps is None else f"{one.steps:.0f}",
            "" if one.seconds is None else f"{one.seconds / 60:.1f}",
            "" if one.rollouts is None else f"{one.rollouts:.0%}",
            "" if one.scores is None else f"{one.scores:.0%}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(comparisons: Sequence[Comparison], path: Path, *, title: str) -> None:
    """Reward over steps or time: a thin line for each run, a bold one for the mean over the seeds.

    The bold line is smoothed: each point is the mean of a tenth of the run around it.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, one in enumerate(comparisons):
        color = f"C{number}"
        runs = [curve(one, seed) for seed in one.seeds if _of(one.after, seed).is_file()]
        for places, values in runs:
            axes.plot(places, values, color=color, linewidth=0.6, alpha=0.35)
        if runs:
            places, mean = mean_curve(runs)
            label = f"{one.name}, {len(runs)} seeds" if len(runs) > 1 else one.name
            axes.plot(places, smoothed(mean, len(mean) // 10), color=color, label=label)
    axes.set(
        xlabel=comparisons[0].against,
        ylabel=comparisons[0].reward.removesuffix("/mean"),
        title=title,
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curve(comparison: Comparison, seed: int) -> tuple[list[float], list[float]]:
    """Return steps, or minutes since the start, and the reward at each."""
    lines = read_log(_of(comparison.log, seed))
    lines = [line for line in lines if comparison.reward in line]
    places = [line["step"] for line in lines]
    if comparison.against == "minutes":
        places = [seconds / 60 for seconds in accumulate(line["seconds"] for line in lines)]
    return places, [line[comparison.reward] for line in lines]


def mean_curve(
    runs: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> tuple[list[float], list[float]]:
    """Return the mean of curves where all are known, at as many places as the longest one has.

    Between its points a curve is a straight line: in one time runs come to different steps.
    """
    start = max(places[0] for places, _ in runs)
    stop = max(start, min(places[-1] for places, _ in runs))
    common = np.linspace(start, stop, max(len(places) for places, _ in runs))
    mean = np.mean([np.interp(common, places, values) for places, values in runs], axis=0)
    return common.tolist(), mean.tolist()


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Each with the mean of those at most width / 2 places away."""
    reach = width // 2
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def main(comparisons: list[Comparison], *, out: Path = Path("runs/rl")) -> None:
    """Print what each run gained, and write the table (table.md, table.json) and a plot of rewards.

    Args:
        comparisons: Runs, each beside the model that it started from; those that are not done yet
            are named and left out.
        out: Folder for the table and the plots.
    """
    outcomes = []
    for one in comparisons:
        found = outcome(one)
        if found is None:
            print(f"{one.name}: not run yet ({one.before}, {one.after})")
        else:
            outcomes.append(found)
    if not outcomes:
        raise ValueError("none of the runs is done; start them with: make rl")
    print(table(outcomes))
    atomic_write(out / "table.md", lambda file: file.write((table(outcomes) + "\n").encode()))
    plain = json.dumps([asdict(one) for one in outcomes], indent=2)
    atomic_write(out / "table.json", lambda file: file.write((plain + "\n").encode()))
    done = {found.name for found in outcomes}
    plots: dict[str, list[Comparison]] = {}
    for one in comparisons:
        if one.log and one.name in done:
            plots.setdefault(one.plot or one.name, []).append(one)
    for title, together in plots.items():
        path = out / f"{'_'.join(re.findall('[a-z0-9]+', title.lower()))}.png"
        plot(together, path, title=title)
        print(path)


def _of(path: str, seed: int) -> Path:
    return Path(path.replace(SEED, str(seed)))


if __name__ == "__main__":
    command_line.run(main)
