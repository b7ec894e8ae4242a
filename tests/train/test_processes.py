"""Two processes that talk over gloo are one process with twice the accumulation."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.tiny import (
    Regression,
    Rows,
    Run,
    fit_one_of_two,
    logged,
    settings,
    trajectory,
)
from train.loop import fit
from train.optimizer import AdamW

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)
OPTIONS: dict[str, Any] = {"optimizer": AdamW(learning_rate=0.05), "ema": 0.9, "clip": 0.5}


def two(
    out: Path,
    options: dict[str, Any],
    *,
    stopped_at: int | None = None,
    sharded: bool = False,
    slowness: float = 0.0,
) -> None:
    """Both processes to their end."""
    out.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = [
        Run(
            fit_one_of_two,
            rank,
            port,
            out,
            options,
            stopped_at if rank else None,
            sharded,
            slowness,
            folder=out.parent,
        )
        for rank in (0, 1)
    ]
    for one in runs:
        assert one.exit_code() == 0, one.errors.read_text()[-3000:]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one_with_twice_the_accumulation(
    accumulation: int, sharded: bool, tmp_path: Path
) -> None:
    alone = Regression()
    fit(
        alone,
        Rows(2),
        settings=settings(**OPTIONS, accumulation=2 * accumulation),
        out=tmp_path / "alone",
    )
    two(tmp_path / "two", {**OPTIONS, "accumulation": accumulation}, sharded=sharded)
    for one, both in zip(logged(tmp_path / "alone"), logged(tmp_path / "two"), strict=True):
        for name in ("step", "loss/text", "loss/image", "grad_norm", "learning_rate"):
            assert both[name] == pytest.approx(one[name], rel=1e-4), (name, one["step"])
    weights = [torch.load(tmp_path / "two" / f"weights_{rank}.pt") for rank in (0, 1)]
    if sharded:
        assert weights.pop() == {}  # they are whole on the main process alone
    for name, tensor in alone.state_dict().items():
        assert torch.equal(weights[0][name], weights[-1][name])
        torch.testing.assert_close(weights[0][name], tensor, atol=1e-4, rtol=1e-4)


def test_a_signal_to_one_process_stops_both_at_one_step(tmp_path: Path) -> None:
    two(tmp_path / "whole", OPTIONS)
    stopped = tmp_path / "stopped"
    two(stopped, OPTIONS, stopped_at=4)
    assert [entry["step"] for entry in logged(stopped)] == [1, 2, 3, 4, 5]
    last = stopped / "step_00000005"
    assert {"loader_0.pt", "loader_1.pt", "random_states_1.pkl"} <= {p.name for p in last.iterdir()}
    assert not list(stopped.glob("*.part"))
    two(stopped, OPTIONS)
    assert trajectory(stopped) == trajectory(tmp_path / "whole")


def test_sharded_weights_are_written_while_the_run_goes_on(tmp_path: Path) -> None:
    """What is written are those of the step that asked, though they change meanwhile."""
    options = {**OPTIONS, "keep": 9, "checkpoint_every": 3, "steps": 8}
    two(tmp_path / "whole", options, sharded=True)
    slow = tmp_path / "slow"
    two(slow, options, sharded=True, slowness=1.0)
    assert trajectory(slow) == trajectory(tmp_path / "whole")
    assert sum(entry["seconds"] for entry in logged(slow)[3:5]) < 1.0  # steps 4 and 5
    for step in (6, 8):
        shutil.rmtree(slow / f"step_{step:08d}")
    two(slow, options, sharded=True)
    assert trajectory(slow) == trajectory(tmp_path / "whole")


def test_a_sharded_run_does_not_go_on_from_one_that_is_not(tmp_path: Path) -> None:
    out = tmp_path / "run"
    two(out, OPTIONS)
    with pytest.raises(AssertionError, match="does not fit this run"):
        two(out, {**OPTIONS, "steps": 9}, sharded=True)
