"""Corruption touches targets only, and as many of them as the schedule says."""

from __future__ import annotations

import pytest
import torch

from mmdlm.core.diffusion.forward import Absorbing, ForwardProcess, PerModality
from mmdlm.core.diffusion.schedule import Cosine, Linear
from mmdlm.core.sequence import Batch, collate, pack
from mmdlm.core.vocabulary import Modality
from mmdlm.experimental.neighbor_noise import TokenNeighbor
from mmdlm.experimental.schedules import Polynomial
from mmdlm.experimental.uniform import Uniform
from tests.core.fakes import VOCABULARY, copies, document, ragged, rng

PROCESSES: list[ForwardProcess] = [
    Absorbing(Linear()),
    Absorbing(Cosine(), exact_count=True),
    Absorbing(Linear(), exact_count=True, rounding="nearest"),
    Uniform(Linear()),
    Uniform(Cosine(), exact_count=True),
    TokenNeighbor(Linear()),
    PerModality(text=Absorbing(Linear()), image=Absorbing(Cosine(), exact_count=True)),
    PerModality(text=Absorbing(Linear()), image=Uniform(Polynomial(2))),
]


def packed() -> Batch:
    documents = [document(n, k, seed=n, prompt=2) for n, k in ((20, 10), (7, 10), (9, 0), (2, 3))]
    return pack(documents, VOCABULARY, length=48)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_touches_targets_only(process: ForwardProcess):
    batch = ragged()
    before = batch.ids.clone()
    t = torch.rand(batch.ids.shape, generator=rng())
    corruption = process.corrupt(batch, t, VOCABULARY, generator=rng())
    assert not (corruption.is_noised & ~batch.target).any()
    assert torch.equal(corruption.x_t[~corruption.is_noised], batch.ids[~corruption.is_noised])
    assert torch.equal(batch.ids, before)
    for part in (corruption.t, corruption.p_mask, corruption.weight):
        assert part.shape == batch.ids.shape
        assert torch.isfinite(part[batch.target]).all()


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_clean_at_0_and_all_noise_at_1(process: ForwardProcess):
    batch = ragged()
    clean, noise = (
        process.corrupt(batch, torch.full((len(batch),), t), VOCABULARY, generator=rng())
        for t in (0.0, 1.0)
    )
    assert torch.equal(noise.is_noised, batch.target)
    if "nearest" not in str(process):  # which masks one token at least
        assert not clean.is_noised.any()
        assert torch.equal(clean.x_t, batch.ids)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_is_a_function_of_the_generator(process: ForwardProcess):
    batch, t = ragged(), torch.full((5,), 0.5)
    a, b, c = (process.corrupt(batch, t, VOCABULARY, generator=rng(s)) for s in (0, 0, 1))
    assert torch.equal(a.x_t, b.x_t)
    assert not torch.equal(a.x_t, c.x_t)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Polynomial(3)], ids=str)
def test_bernoulli_rate(schedule):
    batch = copies(document(2000, 0), 3)
    t = torch.tensor([0.2, 0.5, 0.9])
    masked = Absorbing(schedule).corrupt(batch, t, VOCABULARY, generator=rng()).is_noised
    torch.testing.assert_close(masked.sum(1) / 2000, schedule.p_mask(t), atol=0.03, rtol=0)


@pytest.mark.parametrize("rounding", ["up", "nearest"])
@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=str)
def test_exact_count_of_each_document_and_modality(schedule, rounding):
    """Each document of a packed row has its own time, and text and image their own count."""
    batch = packed()
    t = torch.rand(len(batch), 9, generator=rng()).gather(1, batch.document.clamp_min(0))
    process = Absorbing(schedule, exact_count=True, rounding=rounding)
    corruption = process.corrupt(batch, t, VOCABULARY, generator=rng())
    groups = 0
    for row in range(len(batch)):
        for number in range(int(batch.document[row].max()) + 1):
            for modality in (Modality.TEXT, Modality.IMAGE):
                here = batch.target & (batch.document == number) & batch.of(modality)
                here[torch.arange(len(batch)) != row] = False
                n = int(here.sum())
                if n == 0:
                    continue
                groups += 1
                p_mask = schedule.p_mask(t[here][:1])
                k = (n * p_mask).ceil() if rounding == "up" else (n * p_mask).round().clamp_min(1)
                assert int(corruption.is_noised[here].sum()) == int(k)
                torch.testing.assert_close(corruption.p_mask[here], (k / n).expand(n))
                expected = schedule.slope(t[here]) * n / k
                torch.testing.assert_close(corruption.weight[here], expected)
    assert groups == 7


def test_exact_count_follows_times_that_differ_within_a_document():
    batch = collate([document(10, 0, prompt=1), document(6, 4)], VOCABULARY)
    t = torch.full(batch.ids.shape, 0.5)
    t[0, -5:] = 1.0  # half of the ten text tokens of the first row
    masked = (
        Absorbing(Linear(), exact_count=True)
        .corrupt(batch, t, VOCABULARY, generator=rng())
        .is_noised
    )
    assert masked[0, -5:].all()
    assert int(masked[0].sum()) == 5 + 3  # ceil(5 / 2)
    assert int(masked[1].sum()) == 3 + 2


def test_exact_count_chooses_every_subset_equally():
    batch = copies(document(4, 0), 6000)
    masked = (
        Absorbing(Linear(), exact_count=True)
        .corrupt(batch, torch.full((6000,), 0.5), VOCABULARY, generator=rng())
        .is_noised[batch.target]
        .view(-1, 4)
    )
    subsets = torch.bincount(masked.long() @ torch.tensor([8, 4, 2, 1]), minlength=16)
    assert sorted(subsets.nonzero().flatten().tolist()) == [3, 5, 6, 9, 10, 12]
    assert (subsets[subsets > 0] - 1000).abs().max() < 130


def test_rounding_up_makes_the_count_uniform():
    n, draws = 5, 20_000
    batch = copies(document(n, 0), draws)
    t = torch.rand(draws, generator=rng())
    masked = (
        Absorbing(Linear(), exact_count=True)
        .corrupt(batch, t, VOCABULARY, generator=rng())
        .is_noised
    )
    counts = torch.bincount(masked.sum(1), minlength=n + 1) / draws
    torch.testing.assert_close(counts[1:], torch.full((n,), 1 / n), atol=0.02, rtol=0)
    assert counts[0] == 0


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_complement_covers_every_target_once(process: ForwardProcess):
    batch = packed()
    t = torch.full((len(batch),), 0.3)
    first = process.corrupt(batch, t, VOCABULARY, generator=rng())
    second = process.complement(batch, first, VOCABULARY, generator=rng())
    assert torch.equal(first.is_noised ^ second.is_noised, batch.target)
    assert torch.equal(second.x_t[~second.is_noised], batch.ids[~second.is_noised])
    slope = (first.weight * first.p_mask)[batch.target]
    torch.testing.assert_close((second.weight * second.p_mask)[batch.target], slope)
    assert torch.isfinite(second.weight[second.is_noised]).all()


def test_complement_of_a_linear_schedule_has_the_weight_of_the_other_end():
    batch, process = packed(), Absorbing(Linear())
    first = process.corrupt(batch, torch.full((len(batch),), 0.3), VOCABULARY, generator=rng())
    second = process.complement(batch, first, VOCABULARY, generator=rng())
    torch.testing.assert_close(second.weight, torch.full_like(second.weight, 1 / 0.7))


def test_per_modality_uses_each_process_for_its_own():
    batch = packed()
    process = PerModality(text=Absorbing(Polynomial(8)), image=Uniform(Linear()))
    corruption = process.corrupt(batch, torch.full((len(batch),), 0.5), VOCABULARY, generator=rng())
    text, image = batch.of(Modality.TEXT), batch.of(Modality.IMAGE)
    assert (corruption.p_mask[text & batch.target] == 0.5**8).all()
    assert (corruption.p_mask[image & batch.target] == 0.5).all()
    assert (corruption.x_t[image] != VOCABULARY.mask_id).all()
    assert (corruption.x_t[text & corruption.is_noised] == VOCABULARY.mask_id).all()
    assert process.of(Modality.IMAGE) == Uniform(Linear())


def test_cover_all_covers_clean_targets_too():
    batch, t = ragged(), torch.full((5,), 0.5)
    noised = Uniform(Linear()).corrupt(batch, t, VOCABULARY, generator=rng())
    everything = Uniform(Linear(), cover_all=True).corrupt(batch, t, VOCABULARY, generator=rng())
    assert torch.equal(everything.loss_mask, batch.target)
    assert torch.equal(everything.is_noised, noised.is_noised)
    assert torch.equal(noised.loss_mask, noised.is_noised)
    assert torch.equal(everything.x_t, noised.x_t)
    with pytest.raises(ValueError, match="cover_all"):
        Uniform(Linear(), cover_all=True).complement(batch, everything, VOCABULARY, generator=rng())


def test_neighbors_drift_before_they_are_forgotten():
    batch = copies(document(0, 5000), 2)
    t = torch.tensor([0.3, 0.97])
    corruption = TokenNeighbor(Linear()).corrupt(batch, t, VOCABULARY, generator=rng())
    distance = (corruption.x_t - batch.ids).abs().double()
    near = [float(distance[r][corruption.is_noised[r]].mean()) for r in range(2)]
    assert near[0] < 0.75 * near[1]


def test_times_must_fit_the_batch():
    with pytest.raises(ValueError, match=r"times of shape \(3,\)"):
        Absorbing(Linear()).corrupt(ragged(), torch.rand(3), VOCABULARY, generator=rng())
