"""Two processes that talk over gloo are one process with twice the accumulation."""

from __future__ import annotations

import json
import pickle
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.tiny import (
    Circumstances,
    Evil,
    Regression,
    Rows,
    Run,
    fit_one_of_two,
    logged,
    settings,
    trajectory,
)
from train.checkpoints.checkpoint import latest
from train.checkpoints.manifest import seal
from train.loop import fit
from train.optimizer import AdamW

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)
OPTIONS: dict[str, Any] = {"optimizer": AdamW(learning_rate=0.05), "ema": 0.9, "max_grad_norm": 0.5}


def two(out: Path, options: dict[str, Any], *, stopped_at: int | None = None, **how: Any) -> None:
    """Both processes to their end, be it a violent one; SIGTERM reaches the second alone."""
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
            Circumstances(stopped_at=stopped_at if rank else None, **how),
            folder=out.parent,
        )
        for rank in (0, 1)
    ]
    expected = -signal.SIGKILL if "killed_at" in how else 0
    for one in runs:
        assert one.exit_code() == expected, one.errors.read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
def test_two_processes_equal_one_with_twice_the_accumulation(
    gradient_accumulation_steps: int, sharded: bool, tmp_path: Path
) -> None:
    alone = Regression()
    fit(
        alone,
        Rows(2),
        settings=settings(**OPTIONS, gradient_accumulation_steps=2 * gradient_accumulation_steps),
        out=tmp_path / "alone",
    )
    two(
        tmp_path / "two",
        {**OPTIONS, "gradient_accumulation_steps": gradient_accumulation_steps},
        sharded=sharded,
    )
    for one, both in zip(logged(tmp_path / "alone"), logged(tmp_path / "two"), strict=True):
        for name in ("step", "loss/text", "loss/image", "grad_norm", "learning_rate"):
            assert both[name] == pytest.approx(one[name], rel=1e-4), (name, one["step"])
    weights = [torch.load(tmp_path / "two" / f"weights_{rank}.pt") for rank in (0, 1)]
    if sharded:
        assert weights.pop() == {}  # they are whole on the main process alone
    for name, tensor in alone.state_dict().items():
        assert torch.equal(weights[0][name], weights[-1][name])
        torch.testing.assert_close(weights[0][name], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
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


@pytest.mark.slow
def test_sharded_weights_are_written_while_the_run_goes_on(tmp_path: Path) -> None:
    """Killed meanwhile it continues from the one before; what is written is of the step asked."""
    options = {**OPTIONS, "save_total_limit": 9, "save_steps": 3, "max_steps": 8}
    two(tmp_path / "whole", options, sharded=True)
    slow = tmp_path / "slow"
    two(slow, options, sharded=True, slowness=2.0, killed_at=7)  # batch 7 is that of step 8
    for rank in (0, 1):
        meanwhile = json.loads((slow / f"meanwhile_{rank}.json").read_text())
        assert meanwhile == ["step_00000006.part"]
    assert latest(slow) == (slow / "step_00000003", 3)  # whole, though weights changed meanwhile
    two(slow, options, sharded=True)
    assert trajectory(slow) == trajectory(tmp_path / "whole")


@pytest.mark.slow
def test_sharded_weights_without_an_average_go_on(tmp_path: Path) -> None:
    """With a decay of 0 there is none to write or to read."""
    out, options = tmp_path / "run", {**OPTIONS, "ema": 0.0, "max_steps": 6, "save_steps": 3}
    two(tmp_path / "whole", options, sharded=True)
    two(out, options, sharded=True, killed_at=4)
    two(out, options, sharded=True)
    assert trajectory(out) == trajectory(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("sharded, how", [(True, "without FSDP"), (False, "under FSDP")])
def test_a_run_does_not_go_on_otherwise_sharded(sharded: bool, how: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    two(out, OPTIONS, sharded=not sharded)
    with pytest.raises(AssertionError, match=f"was written {how}; launch likewise"):
        two(out, {**OPTIONS, "max_steps": 9}, sharded=sharded)


@pytest.mark.slow
def test_a_sharded_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    two(out, OPTIONS, sharded=True, wider=True)
    with pytest.raises(AssertionError, match=r"does not fit this run .*model\.more"):
        two(out, {**OPTIONS, "max_steps": 9}, sharded=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", [".metadata", "__0_0.distcp"])
def test_a_sharded_folder_that_someone_else_prepared_runs_no_code(
    part: str, tmp_path: Path
) -> None:
    out, mark = tmp_path / "run", tmp_path / "mark"
    two(out, OPTIONS, sharded=True)
    newest, _ = latest(out) or pytest.fail("no checkpoint")
    (newest / "sharded" / part).write_bytes(pickle.dumps(Evil(mark)))
    seal(newest)
    with pytest.raises(AssertionError, match="does not fit this run"):
        two(out, {**OPTIONS, "max_steps": 9}, sharded=True)
    assert not mark.exists()
