"""Calls of several threads, batched by steps: each gets what it gets alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mmdlm
from mmdlm.core.kernels.linear import PackedLayers
from mmdlm.core.sampling.denoising import Denoising
from mmdlm.core.sampling.order import Candidates, Order
from mmdlm.pipeline.model import Model
from mmdlm.serving.step_batcher import (
    ClosedError,
    DeadlineError,
    GivenUpError,
    Pass,
    StepBatcher,
    Ticket,
)
from tests.core.fakes import rng


@pytest.fixture(scope="module")
def model() -> Model:
    return mmdlm.load("emoji")


@pytest.fixture
def passes() -> list[Pass]:
    return []


@pytest.fixture
def batcher(passes: list[Pass]) -> Iterator[StepBatcher]:
    with StepBatcher(max_rows=4, observe=passes.append) as batcher:
        yield batcher


def served(model: Model, batcher: StepBatcher, ticket: Ticket | None = None) -> Model:
    return replace(model, runner=partial(batcher, ticket=ticket))


def calls(chance: random.Random, count: int, model: Model) -> list[Callable[[Model], Any]]:
    """Tasks of several kinds, settings and lengths, each a function of the model."""
    names = ["cat", "red heart", "woman firefighter", "dog face", "flag: Japan", "sun"]
    image = model.text_to_image("cat", num_inference_steps=1)[0]
    found: list[Callable[[Model], Any]] = []
    for _ in range(count):
        seed, steps = chance.randrange(1000), chance.choice([2, 3, 5])
        name = chance.choice(names)
        several = chance.randint(1, 2)
        seeds = [seed + n for n in range(several)]

        def draw(
            m: Model, name: str = name, steps: int = steps, seeds: list[int] = seeds
        ) -> list[bytes]:
            images = m.text_to_image(
                name,
                num_inference_steps=steps,
                num_images_per_prompt=len(seeds),
                guidance_scale=1.0 + len(seeds),
                generator=[rng(one) for one in seeds],
            )
            return [one.tobytes() for one in images]

        def caption(m: Model, steps: int = steps, seed: int = seed) -> str:
            return m.caption(image, num_inference_steps=steps + 3, generator=[rng(seed)])

        def infill(m: Model, name: str = name, steps: int = steps) -> str:
            return m.infill(f"{name} [MASK:3] skin tone", num_inference_steps=steps)

        def inpaint(m: Model, name: str = name, steps: int = steps, seed: int = seed) -> bytes:
            mask = torch.zeros(image.height, image.width, dtype=torch.bool)
            mask[: 8 * steps] = True
            return m.inpaint(
                image, mask, name, num_inference_steps=steps, generator=rng(seed)
            ).tobytes()

        found.append(chance.choice([draw, caption, infill, inpaint]))
    return found


def together(model: Model, batcher: StepBatcher, tasks: list[Callable[[Model], Any]]) -> list[Any]:
    shared = served(model, batcher)
    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(lambda task: task(shared), tasks))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_what_a_call_gets_does_not_depend_on_others(
    model: Model, batcher: StepBatcher, passes: list[Pass], seed: int
) -> None:
    tasks = calls(random.Random(seed), 12, model)
    found = together(model, batcher, tasks)
    for task, here in zip(tasks, found, strict=True):
        assert task(model) == here
    assert max(one.rows for one in passes) > 1, "calls were batched"
    assert max(one.rows for one in passes) <= 4
    assert batcher.waiting == batcher.running == 0


def test_calls_share_forward_passes(model: Model, batcher: StepBatcher, passes: list[Pass]) -> None:
    tasks: list[Callable[[Model], Any]] = [
        lambda m, n=n: m.infill("woman [MASK] [MASK] skin tone", generator=[rng(n)])
        for n in range(4)
    ]
    gate = threading.Event()
    ticket = Ticket()
    blocker = threading.Thread(
        target=lambda: list(served(model, partial(slow, batcher, gate), ticket).infill("a [MASK]"))
    )
    blocker.start()
    found = together(model, batcher, tasks)
    gate.set()
    blocker.join()
    assert found == [model.infill("woman [MASK] [MASK] skin tone")] * 4
    assert sum(one.rows for one in passes) > len(passes)


def slow(batcher: StepBatcher, gate: threading.Event, *args: Any, **options: Any) -> Any:
    gate.wait(10)
    return batcher(*args, **options)


def test_every_step_is_seen_by_who_asks(model: Model, batcher: StepBatcher) -> None:
    options: Any = {"num_inference_steps": 3, "guidance_scale": 1.0}
    frames = list(served(model, batcher).draw_trajectory("cat", generator=[rng(3)], **options))
    alone = list(model.draw_trajectory("cat", generator=[rng(3)], **options))
    assert [one[0].tobytes() for one in frames] == [one[0].tobytes() for one in alone]


def test_rows_that_share_a_generator_stay_together(model: Model, batcher: StepBatcher) -> None:
    def both(m: Model) -> list[bytes]:
        images = m.text_to_image(["cat", "dog face"], num_inference_steps=2, generator=rng(4))
        return [one.tobytes() for one in images]

    assert both(served(model, batcher)) == both(model)


@dataclass(frozen=True)
class Waiting(Order):
    """An order that lets a test act between two steps."""

    act: Callable[[], None]

    def score(self, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        self.act()
        return candidates.log_prob


def with_order(model: Model, act: Callable[[], None]) -> Model:
    infill = replace(model.defaults.infill, order=Waiting(act))
    return replace(model, defaults=replace(model.defaults, infill=infill))


TEXT = "woman [MASK:4] skin tone"


def test_a_call_that_is_given_up_leaves_before_the_next_step(
    model: Model, batcher: StepBatcher, passes: list[Pass]
) -> None:
    ticket = Ticket()
    with pytest.raises(GivenUpError):
        served(with_order(model, ticket.give_up), batcher, ticket).infill(TEXT)
    assert len(passes) == 1
    assert served(model, batcher).infill(TEXT) == model.infill(TEXT)


def test_a_deadline_ends_a_call_that_runs_and_one_that_waits(
    model: Model, batcher: StepBatcher, passes: list[Pass]
) -> None:
    late = Ticket(deadline=time.monotonic() - 1)
    with pytest.raises(DeadlineError):
        served(model, batcher, late).infill(TEXT)
    assert not passes
    soon = Ticket(deadline=time.monotonic() + 60)

    def act() -> None:
        soon.deadline = 0.0

    with pytest.raises(DeadlineError):
        served(with_order(model, act), batcher, soon).infill(TEXT)
    assert len(passes) == 1


def test_an_error_within_a_step_is_that_of_its_call_only(
    model: Model, batcher: StepBatcher
) -> None:
    def fail() -> None:
        raise RuntimeError("mine")

    broken = with_order(model, fail)
    tasks: list[Callable[[Model], Any]] = [
        lambda m: served(broken, batcher).infill(TEXT),
        lambda m: m.infill(TEXT),
    ]
    shared = served(model, batcher)
    with ThreadPoolExecutor(2) as pool:
        bad, good = (pool.submit(task, shared) for task in tasks)
        assert good.result() == model.infill(TEXT)
        with pytest.raises(RuntimeError, match="mine"):
            bad.result()


def test_numbers_that_are_not_finite_end_only_their_call(
    model: Model, batcher: StepBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        type(model.denoiser),
        "logits_at",
        lambda self, hidden, positions, ids=None: torch.full(
            (int(positions.sum()), ids[1] - ids[0]), torch.nan
        ),
    )
    with pytest.raises(ValueError, match="not finite"):
        served(model, batcher).infill(TEXT)
    monkeypatch.undo()
    assert served(model, batcher).infill(TEXT) == model.infill(TEXT)


@pytest.mark.parametrize("what", ["joined", "renew"])
def test_no_room_for_newcomers_is_an_error_of_theirs(
    what: str, model: Model, batcher: StepBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails before a step leaves the worker alive, and nobody waits for ever."""
    entered, gate = threading.Event(), threading.Event()

    def act() -> None:
        entered.set()
        gate.wait(20)

    def fail(*_: Any) -> Any:
        raise MemoryError("no room")

    with ThreadPoolExecutor(2) as pool:
        if what == "joined":
            first = pool.submit(served(with_order(model, act), batcher).infill, TEXT)
            assert entered.wait(20)
            monkeypatch.setattr(Denoising, "joined", fail)
            monkeypatch.setattr(Denoising, "joins", lambda *_: True)
        else:
            monkeypatch.setattr(PackedLayers, "renew", fail)
        late = pool.submit(served(model, batcher).infill, TEXT)
        while what == "joined" and not batcher.waiting:
            time.sleep(0.01)
        gate.set()
        with pytest.raises(MemoryError, match="no room"):
            late.result(20)
        monkeypatch.undo()
        if what == "joined":
            assert first.result(20) == model.infill(TEXT)
    assert batcher.is_alive
    assert served(model, batcher).infill(TEXT) == model.infill(TEXT)


def test_a_closed_batcher_finishes_what_it_has_and_takes_no_more(model: Model) -> None:
    batcher = StepBatcher()
    closing = threading.Thread(target=batcher.close)
    started = threading.Event()

    def act() -> None:
        if not started.is_set():
            started.set()
            closing.start()

    assert served(with_order(model, act), batcher).infill(TEXT)
    closing.join(10)
    with pytest.raises(ClosedError):
        served(model, batcher).infill(TEXT)


def test_room_for_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        StepBatcher(max_rows=0)
