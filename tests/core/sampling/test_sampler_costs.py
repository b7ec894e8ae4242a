"""What a step of the sampler costs: what it asks of the device, and the memory it takes."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmdlm.core.diffusion.schedule import Shifted
from mmdlm.core.host_masks import HostMasks
from mmdlm.core.sampling import forward_passes as passes
from mmdlm.core.sampling import positions, row_state
from mmdlm.core.sampling import unmasking as unmasking
from mmdlm.core.sampling.cache import Cache, Delayed, Dual, Stable
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import Candidates, Confidence, Entropy, Margin, Random
from mmdlm.core.sampling.remasking import Remasking
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import CatchUpTransfer, PlannedTransfer, Threshold
from mmdlm.core.sequence import Batch, Sequence, collate, text_segment
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.experimental import neighbor_noise
from mmdlm.experimental.neighbor_noise import IdNeighborhood, NeighborNoise
from tests.core.fakes import VOCABULARY, document, rng
from tests.models.tiny import tiny_model

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim")
BEFORE = 4  # the layout of the batch and of what stands against it, rows that are alike, the end


class Waits(TorchDispatchMode):
    """Counts operators that make the host wait for a device: by a value, or by a size."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(one, Tensor) and one.dtype == torch.bool for one in indices)
        self.count += name in WAITS or by_mask
        return func(*args, **(kwargs or {}))


def waits_of(sampler: Sampler, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How often a run waits for the device, beyond what it asks of the CPU, and its steps."""
    model = tiny_model(vocabulary=VOCABULARY.to_dict(), num_hidden_layers=3)
    waits = Waits()

    def told(function: Any) -> Any:
        def asks(*given: Any, **named: Any) -> Any:
            waits.count += 1
            return function(*given, **named)

        return asks

    # who else calls it gives it what lies on the host
    for room in (row_state, unmasking, neighbor_noise, passes):
        monkeypatch.setattr(room, "on_host", told(room.on_host))
    monkeypatch.setattr(HostMasks, "of", told(HostMasks.of))
    for name in ("cpu", "tolist", "item", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, told(getattr(Tensor, name)))
    with waits:
        steps = sum(1 for _ in sampler.trajectory(model, batch, generator=rng()))
    monkeypatch.undo()
    return waits.count, steps


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(steps=8),
        Sampler(steps=8, temperature=1.0, guidance=ClassifierFreeGuidance(2.0), top_k=3, top_p=0.9),
        Sampler(steps=9, order=Random(), unmasking=CatchUpTransfer(), block_length=6),
        Sampler(
            steps=9,
            unmasking=PlannedTransfer(Shifted(3.0)),
            suppress_tokens=(1,),
            deprioritized_ids=(2,),
        ),
        Sampler(steps=12, unmasking=Threshold(0.3, in_order=True, distinct=True), stop_ids=(3,)),
        Sampler(steps=12, remask=Remasking(0.4), order=Margin(1.0), temperature=1.0),
        Sampler(steps=8, noise=NeighborNoise(IdNeighborhood(2)), temperature=1.0),
    ],
    ids=range(7),
)
@pytest.mark.parametrize("cache", [None, Dual(), Delayed(), Stable()], ids=str)
def test_a_step_waits_for_the_device_twice_at_most(
    sampler: Sampler, cache: Cache | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [document(5, 8, seed=1, prompt=3), document(9, 0, seed=2, prompt=2)]
    batch = collate([*rows, document(2, 8, seed=4, prompt=9), rows[0]], VOCABULARY)
    count, steps = waits_of(replace(sampler, cache=cache), batch, monkeypatch)
    assert steps > 5
    each = 2 if isinstance(sampler.noise, NeighborNoise) else 1
    assert count <= each * steps + BEFORE


# ---- memory -------------------------------------------------------------------------------------


class Wide(torch.nn.Module):
    """A linear head over many ids, whose states are all there is to remember."""

    def __init__(self, size: int, width: int = 8) -> None:
        super().__init__()
        self.vocabulary = Vocabulary.build(text_size=size, eos_id=0)
        generator = rng()
        self.token = torch.randn(self.vocabulary.size, width, generator=generator)
        self.head = torch.randn(width, self.vocabulary.size, generator=generator)

    def hidden(self, x_t: Tensor, batch: Batch, **_: Any) -> Tensor:
        return self.token[(x_t + batch.position) % len(self.token)]

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        return hidden[positions] @ self.head[:, slice(*(ids or (None,)))]


def peak(run: Any) -> int:
    """Most bytes that a call has allocated at a time."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(steps=1),
        Sampler(steps=1, temperature=1.0, order=Confidence(1.0), suppress_tokens=(3, 4)),
        Sampler(steps=1, temperature=1.0, order=Entropy(), top_k=50, top_p=0.9),
        Sampler(steps=1, temperature=1.0, order=Margin(), deprioritized_ids=(5,)),
        Sampler(steps=1, order=Random(), guidance=ClassifierFreeGuidance(2.0)),
        Sampler(steps=1, temperature=0.5, score_after_temperature=True, top_p=0.5),
    ],
    ids=range(6),
)
def test_a_step_takes_little_memory_beside_the_logits(sampler: Sampler) -> None:
    rows, length, size = 8, 64, 32_000
    denoiser = Wide(size)
    prompt = text_segment([1, 2])
    batch = collate(
        [Sequence((prompt, text_segment([0] * length, target=True)))] * rows, denoiser.vocabulary
    )
    logits = 4 * rows * length * size
    most = peak(lambda: sampler(denoiser, batch, generator=rng()))
    assert 0.5 * logits < most <= 1.2 * logits


@pytest.mark.parametrize("order", [Confidence(1.0), Entropy(), Margin(), Random()], ids=str)
def test_tokens_do_not_depend_on_how_many_are_looked_at_together(
    order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = Wide(50)
    batch = collate(
        [Sequence((text_segment([0] * n, target=True),)) for n in (9, 30, 17)], denoiser.vocabulary
    )
    sampler = Sampler(
        steps=5, temperature=1.0, order=order, top_k=20, guidance=ClassifierFreeGuidance(1.5)
    )
    whole = sampler(denoiser, batch, generator=rng())
    monkeypatch.setattr(positions, "_LEAST", 120)
    monkeypatch.setattr(positions, "_MOST", 300)
    parts = sampler(denoiser, batch, generator=rng())
    assert torch.equal(parts.ids, whole.ids)
    assert torch.equal(parts.steps, whole.steps)


def test_an_order_of_ones_own_sees_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []

    class Native(Confidence):
        def score(self, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
            seen.append(candidates.logits.shape)
            return candidates.logits.amax(-1)

    monkeypatch.setattr(positions, "_LEAST", 120)
    denoiser = Wide(50)
    batch = collate([Sequence((text_segment([0] * 9, target=True),))], denoiser.vocabulary)
    Sampler(steps=3, order=Native())(denoiser, batch, generator=rng())
    assert seen == [(9, 50), (6, 50), (3, 50)]


# ---- numbers that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(
    value: float, steps: int, temperature: float
) -> None:
    denoiser = Wide(50)
    batch = collate([Sequence((text_segment([0] * 9, target=True),))] * 2, denoiser.vocabulary)
    sampler = Sampler(steps=steps, temperature=temperature)
    sampler(denoiser, batch, generator=rng())
    denoiser.head[:, 7] = value
    with pytest.raises(ValueError, match="numbers are not finite.*2 of 2 outputs.*bfloat16"):
        sampler(denoiser, batch, generator=rng())
    denoiser.head[:, 7] = -1e30
    denoiser.head[0] = 0
    sampler(denoiser, batch, generator=rng())
