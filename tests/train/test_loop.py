"""The loop divides once by global counts, stops and continues exactly, and says what is wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.tiny import (
    KINDS,
    WIDTH,
    Plain,
    Regression,
    Rows,
    logged,
    row,
    settings,
    trajectory,
)
from train import loop
from train.log import LOG
from train.loop import fit
from train.optimizer import AdamW, Cosine, Optimizer
from train.optimizer_step import step_generator
from train.stages.meter import MEASURED
from train.stopping import SIGNALS
from train.training_config import TrainingConfig


class Crash(Exception):
    """The process dies here."""


def crash_at(batch: int) -> Any:
    def on_batch(number: int) -> None:
        if number == batch:
            raise Crash

    return on_batch


def run(out: Path, *, batch_size: int = 4, noisy: bool = True, **options: Any) -> Regression:
    """A whole run; the stage as it is at its end."""
    on_batch = options.pop("on_batch", lambda number: None)
    on_sample = options.pop("on_sample", None)
    stage = Regression(noisy=noisy)
    loader = Rows(batch_size, on_batch=on_batch)
    fit(stage, loader, settings=settings(**options), out=out, on_sample=on_sample)
    return stage


# ---- what is minimised --------------------------------------------------------------------------


def by_hand(weight: Tensor, bias: Tensor, rows: list[Tensor]) -> tuple[dict[str, float], Tensor]:
    """Means and the gradient [WIDTH + 1] of the loss over all rows, in float64."""
    x = torch.stack(rows).double()
    error = x @ weight[0].detach().double() + bias.detach().double() - x[:, 1]
    means, gradient = {}, torch.zeros(len(weight[0]) + 1, dtype=torch.float64)
    for kind, coefficient in Regression.coefficients.items():
        where = Regression.rows(x)[kind]
        means[kind] = float((error.square() * where).sum() / where.sum())
        slope = 2 * error * where / where.sum() * coefficient
        gradient += torch.cat([slope @ x, slope.sum()[None]])
    return means, gradient


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2, 4])
def test_accumulation_equals_one_large_batch(
    gradient_accumulation_steps: int, tmp_path: Path
) -> None:
    start = Regression()
    rows = [row(n) for n in range(8)]
    size = 8 // gradient_accumulation_steps
    texts = [
        int(Regression.rows(torch.stack(rows[i : i + size]))["text"].sum())
        for i in range(0, 8, size)
    ]
    assert gradient_accumulation_steps == 1 or len(set(texts)) > 1  # else a mean of means would do
    means, gradient = by_hand(start.linear.weight, start.linear.bias, rows)

    stage = run(
        tmp_path,
        batch_size=size,
        noisy=False,
        max_steps=1,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    (entry,) = logged(tmp_path)
    for kind in KINDS:
        assert entry[f"loss/{kind}"] == pytest.approx(means[kind], rel=1e-5)
    assert entry["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
    moved = torch.cat(
        [(b - a).flatten() for a, b in zip(start.parameters(), stage.parameters(), strict=True)]
    )
    torch.testing.assert_close(moved.double(), -0.1 * gradient, atol=1e-6, rtol=1e-5)


def test_a_batch_without_one_kind_costs_nothing(tmp_path: Path) -> None:
    class OneKind(Rows):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                yield batch.abs()

    stage = Regression()
    fit(stage, OneKind(4), settings=settings(max_steps=2), out=tmp_path)
    assert [entry["loss/image"] for entry in logged(tmp_path)] == [0.0, 0.0]
    assert all(p.isfinite().all() for p in stage.parameters())


class Gaps(Rows):
    """Every third batch has no rows, or rows that nothing is learned of."""

    def __init__(self, *args: Any, rows: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rows = rows

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield torch.full((self.rows, WIDTH), NOTHING) if self.given % 3 == 0 else batch


class Unmoved(Regression):
    """Rows that are marked have a loss and no gradient, as answers of equal rewards do."""

    def forward(self, batch: Tensor, noise: Tensor) -> dict[str, Tensor]:
        if bool((batch == NOTHING).all()):
            return {kind: (self.linear(batch) * 0).sum() + 1 for kind in KINDS}
        return super().forward(batch, noise)


NOTHING = 7.0


@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "no gradient"])
@pytest.mark.parametrize(
    "optimizer", [Plain(momentum=0.9), AdamW(learning_rate=0.05, weight_decay=0.5)], ids=str
)
def test_a_step_without_anything_to_learn_moves_nothing(
    optimizer: Optimizer, rows: int, tmp_path: Path
) -> None:
    """Momentum, decay and the average stand still; it is counted, across a kill as well."""

    def train(out: Path, *, max_steps: int = 7, crash: int = 99) -> list[Tensor]:
        stage = Unmoved()
        loader = Gaps(4, rows=rows, on_batch=crash_at(crash))
        rate = Cosine(final=1.0)  # constant, so that runs of several lengths begin alike
        options = settings(
            optimizer=optimizer, schedule=rate, ema=0.9, max_steps=max_steps, save_steps=4
        )
        fit(stage, loader, settings=options, out=out)
        return [p.detach().clone() for p in stage.parameters()]

    before, after, later = (train(tmp_path / str(n), max_steps=n) for n in (2, 3, 4))
    for a, b, c in zip(before, after, later, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(b, c)
    train(tmp_path / "whole")
    entries = logged(tmp_path / "whole")
    assert [entry.get("skipped_steps", 0) for entry in entries] == [0, 0, 1, 1, 1, 2, 2]
    assert [entry["grad_norm"] == 0 for entry in entries] == [n % 3 == 0 for n in range(1, 8)]
    with pytest.raises(Crash):
        train(tmp_path / "killed", crash=5)
    train(tmp_path / "killed")
    assert trajectory(tmp_path / "killed") == trajectory(tmp_path / "whole")


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    start, stage = Regression(), run(tmp_path, noisy=False, max_steps=1, max_grad_norm=0.01)
    moved = [(b - a).flatten() for a, b in zip(start.parameters(), stage.parameters(), strict=True)]
    assert float(torch.cat(moved).detach().norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert logged(tmp_path)[0]["grad_norm"] > 0.01  # before clipping


def test_the_learning_rate_follows_its_schedule(tmp_path: Path) -> None:
    schedule = Cosine(warmup=3, final=0.1)
    run(tmp_path, schedule=schedule)
    rates = [entry["learning_rate"] for entry in logged(tmp_path)]
    assert rates == [0.1 * schedule.factor(step, 8) for step in range(8)]


def test_noise_depends_on_seed_step_process_and_micro_batch() -> None:
    draws = {
        float(torch.rand((), generator=step_generator(torch.device("cpu"), *seeds)))
        for seeds in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    }
    assert len(draws) == 5


def test_the_log_tells_of_each_logged_step_and_the_last(tmp_path: Path) -> None:
    run(tmp_path, logging_steps=3)
    assert [entry["step"] for entry in logged(tmp_path)] == [3, 6, 8]
    assert logged(tmp_path)[0].keys() == {
        *("step", "loss/text", "loss/image", "grad_norm", "learning_rate"),
        *("seconds", "data_share", "peak_memory_gb"),
    }
    assert {"seconds", "data_share", "peak_memory_gb"} <= set(MEASURED)


def test_nothing_depends_on_the_global_generator(tmp_path: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        run(tmp_path / str(seed))
    assert trajectory(tmp_path / "1") == trajectory(tmp_path / "2")


# ---- stopping and continuing --------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to configure a run; the state of each kind of optimizer has to survive."""

    options: dict[str, Any]


WAYS = {
    "momentum": {"optimizer": Plain(momentum=0.9)},
    "adamw": {"optimizer": AdamW(learning_rate=0.05), "ema": 0.9, "schedule": Cosine(warmup=3)},
    "gradient_accumulation_steps": {
        "optimizer": AdamW(learning_rate=0.05),
        "gradient_accumulation_steps": 3,
        "max_grad_norm": 0.1,
    },
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
def test_a_run_that_dies_goes_on_as_if_it_had_not(options: dict[str, Any], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", **options)
    broken = tmp_path / "broken"
    each = options.get("gradient_accumulation_steps", 1)
    with pytest.raises(Crash):
        run(broken, on_batch=crash_at(5 * each), **options)
    assert len(logged(broken)) == 5  # of which steps 4 and 5 are lost: 3 was saved
    with (broken / LOG).open("a") as file:
        file.write('{"step": 6, "loss/te')  # torn by the kill
    with pytest.raises(Crash):
        run(broken, on_batch=crash_at(7 * each), **options)
    again = run(broken, **options)
    assert trajectory(broken) == trajectory(tmp_path / "whole")
    assert [entry["step"] for entry in logged(broken)] == list(range(1, 9))
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first = run(tmp_path, ema=0.9)
    before = trajectory(tmp_path)
    second = run(tmp_path, ema=0.9, on_batch=crash_at(8))  # not one batch is read
    assert trajectory(tmp_path) == before
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_can_be_made_longer(tmp_path: Path) -> None:
    run(tmp_path, max_steps=4)
    run(tmp_path, max_steps=6)
    assert [entry["step"] for entry in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "number, status",
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
    ids=str,
)
def test_a_signal_ends_the_step_and_saves(
    number: int, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert threading.current_thread() is threading.main_thread()

    def on_batch(batch: int) -> None:
        if batch == 4:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(each) for each in SIGNALS]
    run(tmp_path / "whole")
    with pytest.raises(SystemExit, match="stopped at step 5; the same command continues") as ended:
        run(tmp_path / "stopped", on_batch=on_batch)
    assert ended.value.code == status
    assert "stopped at step 5; the same command continues from there" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert (tmp_path / "stopped" / "step_00000005").is_dir()
    assert not list((tmp_path / "stopped").glob("*.part"))
    run(tmp_path / "stopped")
    assert trajectory(tmp_path / "stopped") == trajectory(tmp_path / "whole")


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(tmp_path, on_batch=lambda number: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(logged(tmp_path)) == 8


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    def on_batch(batch: int) -> None:
        if batch == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_batch=on_batch)
    assert len(logged(tmp_path)) == 2


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    run(tmp_path, save_steps=1, save_total_limit=3)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [
        "step_00000006",
        "step_00000007",
        "step_00000008",
    ]


def test_options_of_the_optimizer_are_those_that_are_set_now(tmp_path: Path) -> None:
    """The stored ones are not put in their place without a word."""
    with pytest.raises(Crash):
        run(tmp_path, optimizer=Plain(learning_rate=0.1), on_batch=crash_at(4))
    run(tmp_path, optimizer=Plain(learning_rate=0.01))
    schedule = TrainingConfig().schedule
    assert [entry["learning_rate"] for entry in logged(tmp_path)] == [
        (0.1 if step < 3 else 0.01) * schedule.factor(step, 8) for step in range(8)
    ]


# ---- samples, trackers --------------------------------------------------------------------------


def test_samples_are_drawn_from_the_averaged_weights(tmp_path: Path) -> None:
    """And leave no trace in the run."""
    stage = Regression(noisy=True)
    seen = {}

    def on_sample(step: int) -> None:
        seen[step] = stage.linear.weight.detach().clone()

    options = {"ema": 0.9, "max_steps": 6}
    fit(
        stage,
        Rows(4),
        settings=settings(sample_steps=4, **options),
        out=tmp_path / "a",
        on_sample=on_sample,
    )
    other = run(tmp_path / "b", **options)
    assert list(seen) == [0, 4, 6]
    assert torch.equal(seen[6], stage.linear.weight)
    assert not torch.equal(seen[4], seen[6])
    assert trajectory(tmp_path / "a") == trajectory(tmp_path / "b")
    assert torch.equal(stage.linear.weight, other.linear.weight)


def test_tensorboard_writes_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, trackers=("tensorboard",))
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert b"loss/text" in events.read_bytes()


def test_a_tracker_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with (
        pytest.warns(UserWarning, match="no supported trackers"),
        pytest.raises(ValueError, match="'wandb' is not installed: pip"),
    ):
        run(tmp_path, trackers=("wandb",))
    with pytest.raises(ValueError, match="wandbb"):
        run(tmp_path, trackers=("wandbb",))


# ---- what goes wrong ----------------------------------------------------------------------------


def test_a_full_disk_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = torch.save, []

    def full(value: Any, path: Any, **options: Any) -> None:
        if Path(path).name.startswith("loader"):
            calls.append(path)
            if len(calls) == 3:  # the first is the rehearsal's
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(value, path, **options)

    run(tmp_path / "whole")
    broken = tmp_path / "broken"
    monkeypatch.setattr(loop.torch, "save", full)
    with pytest.raises(OSError, match="No space left.*step_00000003 is intact"):
        run(broken)
    assert [path.name for path in broken.glob("step_*")] == ["step_00000003"]
    run(broken)
    assert trajectory(broken) == trajectory(tmp_path / "whole")


class Exploding(Regression):
    """Its losses of text are no number in the batches given, counted from 0; none given: in all."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.at, self.batch = at, 0

    def forward(self, batch: Tensor, noise: Tensor) -> dict[str, Tensor]:
        sums = super().forward(batch, noise)
        bad = not self.at or self.batch in self.at
        self.batch += 1
        return {**sums, "text": sums["text"] * float("nan")} if bad else sums


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    """Before it moves the weights, whatever is logged or saved; the batch is named."""
    run(tmp_path, max_steps=4, save_steps=2, gradient_accumulation_steps=2)
    stage = Exploding(1 * 2 + 1)
    said = "nan at step 6 on process 0 .loss text of batch 2 of 2 is nan.*weights were not moved"
    kept: dict[int, Tensor] = {}

    def before(number: int) -> None:
        kept[number] = stage.linear.weight.detach().clone()

    with pytest.raises(ValueError, match=said):
        fit(
            stage,
            Rows(4, on_batch=before),
            settings=settings(gradient_accumulation_steps=2, logging_steps=50, save_steps=50),
            out=tmp_path,
        )
    assert torch.equal(stage.linear.weight, kept[max(kept)])  # as they were before its step
    assert stage.linear.weight.isfinite().all()
    assert sorted(path.name for path in tmp_path.glob("step_*"))[-1] == "step_00000004"


def test_a_step_that_is_no_number_is_left_out_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"not_finite": "skip", "ema": 0.9, "optimizer": AdamW(learning_rate=0.05)}
    stage = Exploding(2, 5)
    fit(stage, Rows(4), settings=settings(**options), out=tmp_path / "a")
    entries = logged(tmp_path / "a")
    assert [entry.get("skipped_steps", 0) for entry in entries] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert (entries[2]["grad_norm"], entries[2]["loss/text"]) == (None, None)
    assert all(p.isfinite().all() for p in stage.parameters())
    said = capsys.readouterr().err
    assert [f"nan at step {step} " in said for step in range(1, 9)].count(True) == 2
    assert said.count("the step is left out") == 2
    # a run that dies meets the same step again, leaves it out again, and goes past it
    with pytest.raises(Crash):
        fit(
            Exploding(2),
            Rows(4, on_batch=crash_at(5)),
            settings=settings(**options),
            out=tmp_path / "b",
        )
    again = Exploding(5 - 3)  # from step 3 on
    fit(again, Rows(4), settings=settings(**options), out=tmp_path / "b")
    assert trajectory(tmp_path / "b") == trajectory(tmp_path / "a")
    assert torch.equal(again.linear.weight, stage.linear.weight)


def test_steps_are_not_left_out_for_ever(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite in 10 steps on end, up to step 10"):
        fit(Exploding(), Rows(4), settings=settings(max_steps=50, not_finite="skip"), out=tmp_path)


def test_a_rate_so_high_that_weights_overflow_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the gradient norm is (nan|inf) at step .*lower learning"):
        run(tmp_path, max_steps=50, optimizer=Plain(learning_rate=1e30), logging_steps=50)


def test_a_run_of_fewer_steps_than_are_done_is_refused(tmp_path: Path) -> None:
    run(tmp_path, max_steps=4)
    with pytest.raises(ValueError, match="step_00000004 is beyond the 3 steps.*at least 4"):
        run(tmp_path, max_steps=3)


def test_a_checkpoint_of_more_processes(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2)
    (tmp_path / "step_00000002" / "loader_1.pt").touch()
    with pytest.raises(ValueError, match="written by 2 processes and cannot be continued .* by 1"):
        run(tmp_path, max_steps=3)


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2)
    stage = Regression()
    stage.linear = torch.nn.Linear(4, 1)
    with pytest.raises(ValueError, match=r"step_00000002 does not fit this run \(.*linear\.weight"):
        fit(stage, Rows(4), settings=settings(), out=tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_steps", 0),
        ("gradient_accumulation_steps", 0),
        ("save_steps", 0),
        ("save_total_limit", 0),
        ("logging_steps", -1),
        ("max_grad_norm", 0.0),
        ("ema", 1.0),
    ],
)
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        TrainingConfig(**{name: value})


def test_the_log_is_json_a_line(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2)
    for line in (tmp_path / LOG).read_text().splitlines():
        assert json.loads(line)["step"] in (1, 2)
