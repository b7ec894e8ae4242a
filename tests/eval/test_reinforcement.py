"""The table of gains: means and spreads over seeds, from the files of benchmarks and runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from eval.reinforcement import (
    Comparison,
    main,
    mean_curve,
    number,
    outcome,
    smoothed,
    table,
)

MEASURE = "results/measures/grid/value"


def write_result(path: Path, value: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"results": {"measures": {"grid": {"value": value}}}}))
    return path


def write_log(path: Path, rewards: list[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "step": n,
            "seconds": 30.0,
            "rollout_share": 0.4 * (n % 2),
            "scoring_share": 0.1,
            "reward": reward,
        }
        for n, reward in enumerate(rewards, 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Two runs of three are done."""
    for seed, value in enumerate((0.7, 0.8)):
        write_result(tmp_path / f"after_{seed}.json", value)
        write_log(tmp_path / f"run_{seed}" / "log.jsonl", [0.1, 0.2, 0.4])
    return Comparison(
        "a task",
        MEASURE,
        before=str(write_result(tmp_path / "before.json", 0.5)),
        after=str(tmp_path / "after_{seed}.json"),
        log=str(tmp_path / "run_{seed}" / "log.jsonl"),
    )


def test_an_outcome_is_a_mean_over_the_seeds_that_are_done(comparison: Comparison) -> None:
    found = outcome(comparison)
    assert found is not None
    assert (found.before, found.after, found.steps, found.seconds) == (0.5, (0.7, 0.8), 3, 90.0)
    assert found.mean == pytest.approx(0.75)
    assert found.spread == pytest.approx(0.1 / math.sqrt(2))


def test_the_table_says_gain_spread_and_every_seed(comparison: Comparison) -> None:
    found = outcome(comparison)
    assert found is not None
    row = table([found]).splitlines()[-1]
    cells = "a task | 50.0 % | 75.0 ± 7.1 % (70.0, 80.0) | +25.0 | 2 | 3 | 1.5 | 27% | 10%"
    assert row == f"| {cells} |"


def test_the_report_is_written_with_a_plot(
    comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = Comparison(
        "later", MEASURE, before=comparison.before, after=str(tmp_path / "no_{seed}")
    )
    main([comparison, later], out=tmp_path / "out")
    assert "later: not run yet" in capsys.readouterr().out
    assert "+25.0" in (tmp_path / "out" / "table.md").read_text()
    assert json.loads((tmp_path / "out" / "table.json").read_text())[0]["after"] == [0.7, 0.8]
    with Image.open(tmp_path / "out" / "a_task.png") as image:
        levels = image.convert("RGB").getcolors(maxcolors=1 << 20)
    assert levels is not None
    assert len(levels) > 50  # curves, not an empty page


def test_a_mean_is_smoothed_without_shifting_it() -> None:
    assert smoothed([1.0, 2.0, 3.0, 4.0], 0) == [1.0, 2.0, 3.0, 4.0]
    assert smoothed([0.0, 3.0, 0.0, 3.0, 0.0], 2) == [1.5, 1.0, 2.0, 1.0, 1.5]


def test_a_mean_over_time_is_of_what_runs_were_at_one_time() -> None:
    slow = [10.0, 20.0, 30.0], [0.0, 1.0, 2.0]
    fast = [5.0 * n for n in range(1, 8)], [10.0] * 7
    places, mean = mean_curve([slow, fast])
    assert places == pytest.approx([10 + 20 * n / 6 for n in range(7)])
    assert mean == pytest.approx([5 + n / 6 for n in range(7)])
    assert mean_curve([slow, slow]) == slow


def test_what_is_missing_is_named(comparison: Comparison, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="has no 'grids' of 'results/measures/grids/value'; it has"
    ):
        number(Path(comparison.before), "results/measures/grids/value")
    nothing = Comparison("none", MEASURE, before=str(tmp_path / "none.json"), after="none_{seed}")
    with pytest.raises(ValueError, match="none of the runs is done; start them with: make rl"):
        main([nothing], out=tmp_path)
    (tmp_path / "run_1" / "log.jsonl").unlink()
    with pytest.raises(ValueError, match="log.jsonl cannot be read"):
        outcome(comparison)
