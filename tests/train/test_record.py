"""A run goes on with the settings that it had; what differs is said, or refused."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.train.tiny import Plain, Regression, Rows, logged, settings
from train.checkpoints.record import Record
from train.loop import fit
from train.optimizer import AdamW, WarmupStableDecay


def run(out: Path, *, told: dict[str, Any] | None = None, **options: Any) -> None:
    chosen = settings(**{"max_steps": 6, "ema": 0.9, **options})
    fit(Regression(), Rows(4), settings=chosen, out=out, told=told or {})


@dataclass(frozen=True)
class Source:
    urls: str = "here"
    weight: float = 1.0


@dataclass(frozen=True)
class Data:
    sources: list[Any] = field(default_factory=lambda: [Source()])
    batch_size: int = 4


@dataclass(frozen=True)
class Other(Plain):
    pass


TOLD: dict[str, Any] = {"data": Data(), "threads": 1, "objective": {"eps": 0.1}}


@pytest.mark.parametrize(
    "options, told, named",
    [
        (
            {"gradient_accumulation_steps": 2},
            {},
            "training.gradient_accumulation_steps was 1 and is 2",
        ),
        ({"ema": 0.5}, {}, "training.ema was 0.9 and is 0.5"),
        ({"seed": 3}, {}, "training.seed was 0 and is 3"),
        ({}, {"data": Data(batch_size=2)}, "data.batch_size was 4 and is 2"),
        ({}, {"data": Data([Source(weight=2.0)])}, "data.sources.0.weight was 1.0 and is 2.0"),
        ({}, {"data": Data([Source(), Source()])}, "data.sources was"),
        ({}, {"objective": {"eps": 0.1, "more": 1}}, 'objective.more was "absent" and is 1'),
        ({}, {"objective": Source()}, "objective"),
        ({}, {"objective": None}, "and is null"),
    ],
)
def test_what_would_be_another_run_is_refused(
    options: dict[str, Any], told: dict[str, Any], named: str, tmp_path: Path
) -> None:
    run(tmp_path, told=TOLD, max_steps=3)
    with pytest.raises(
        ValueError, match="step_00000003 was written with other settings.*"
    ) as error:
        run(tmp_path, told={**TOLD, **told}, **options)
    assert named in str(error.value)
    assert [entry["step"] for entry in logged(tmp_path)] == [1, 2, 3]


def test_other_loss_weights_are_refused(tmp_path: Path) -> None:
    class Weighted(Regression):
        coefficients = {"text": 1.0, "image": 0.25}  # noqa: RUF012

    run(tmp_path, max_steps=3)
    with pytest.raises(ValueError, match=r"loss_weights.image was 0.5 and is 0.25"):
        fit(Weighted(), Rows(4), settings=settings(max_steps=6, ema=0.9), out=tmp_path)


@pytest.mark.parametrize(
    "options, told, named",
    [
        (
            {"optimizer": Plain(learning_rate=0.01)},
            {},
            "optimizer.learning_rate was 0.1 and is 0.01",
        ),
        ({"schedule": WarmupStableDecay()}, {}, "training.schedule.class was"),
        ({"max_grad_norm": 2.0}, {}, "training.max_grad_norm was 1000000.0 and is 2.0"),
        ({}, {"data": Data([Source("there")])}, 'data.sources.0.urls was "here" and is "there"'),
    ],
)
def test_what_may_be_another_is_said(
    options: dict[str, Any],
    told: dict[str, Any],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(tmp_path, told=TOLD, max_steps=3)
    run(tmp_path, told={**TOLD, **told}, **options)
    said = capsys.readouterr().out
    assert "going on with another setting than" in said
    assert named in said
    assert [entry["step"] for entry in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_what_has_no_part_in_it_may_be_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, told=TOLD, max_steps=3)
    capsys.readouterr()
    free = {"save_total_limit": 5, "save_steps": 2, "logging_steps": 2, "not_finite": "skip"}
    run(tmp_path, told={**TOLD, "threads": 8}, max_steps=3, **free)
    assert "another setting" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, told",
    [({"optimizer": Plain(0.01)}, {}), ({}, {"save_dtype": "bfloat16"}), ({"ema": 0.5}, {})],
)
def test_a_finished_run_takes_no_other_settings(
    options: dict[str, Any], told: dict[str, Any], tmp_path: Path
) -> None:
    before = {**TOLD, "save_dtype": "float32"}
    run(tmp_path, told=before)
    (tmp_path / "final").mkdir()
    run(tmp_path, told=before)
    with pytest.raises(ValueError, match="is finished, with other settings.*train into another"):
        run(tmp_path, told={**before, **told}, **options)
    run(tmp_path, told=before, max_steps=8)  # it may be made longer


def test_another_optimizer_is_refused_where_its_state_would_fit(tmp_path: Path) -> None:
    run(tmp_path, max_steps=3, optimizer=Plain(momentum=0.9))
    with pytest.raises(ValueError, match=r"training.optimizer.class was .*Plain.*Other"):
        run(tmp_path, optimizer=Other(momentum=0.9))


def test_settings_of_every_kind_are_kept(tmp_path: Path) -> None:
    class Native:
        def __init__(self) -> None:
            self.size, self.itself = 3, self

    values = {
        "path": Path("a/b"),
        "function": run,
        "partial": functools.partial(run, max_steps=3),
        "kind": AdamW,
        "optimizer": AdamW(),
        "own": Native(),
        "names": ("a", None, float("inf")),
    }
    Record.of(values).write(tmp_path)
    assert Record.of(values).check(tmp_path, finished=True) == []
    changed = {**values, "partial": functools.partial(run, max_steps=4)}
    with pytest.raises(ValueError, match="partial.max_steps was 3 and is 4"):
        Record.of(changed).check(tmp_path, finished=False)
    (tmp_path / "settings.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="settings.json cannot be read"):
        Record.of(values).check(tmp_path, finished=False)
