"""The losses are what their equations say: bounds in nats, as sums and counts, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmdlm.core.diffusion.forward import Absorbing, PerModality
from mmdlm.core.diffusion.schedule import Cosine, Linear, MaskSchedule
from mmdlm.core.losses.objective import LossNormalization, ModalityLoss, Objective
from mmdlm.core.losses.timesteps import IndependentTimesteps, StratifiedTimesteps, Timesteps
from mmdlm.core.losses.token_losses import CrossEntropy, WeightedCrossEntropy
from mmdlm.core.sequence import Batch, collate, pack
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.experimental.neighbor_noise import TokenNeighbor
from mmdlm.experimental.schedules import LogLinear, Polynomial
from mmdlm.experimental.uniform import Uniform
from tests.core.fakes import (
    TEXT,
    VOCABULARY,
    Factorized,
    TinyDenoiser,
    copies,
    document,
    ragged,
    rng,
    with_features,
)

ABSORBING = Absorbing(Linear())


def packed() -> Batch:
    documents = [document(n, k, seed=n, prompt=2) for n, k in ((20, 10), (7, 10), (9, 0), (2, 3))]
    return pack(documents, VOCABULARY, length=48)


# ---- times --------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [StratifiedTimesteps(), IndependentTimesteps()], ids=str)
def test_one_time_for_each_document(times):
    batch = packed()
    t = times(batch, generator=rng())
    values = set()
    for row in range(len(batch)):
        for number in range(int(batch.document[row].max()) + 1):
            here = t[row][batch.document[row] == number]
            assert (here == here[0]).all()
            values.add(float(here[0]))
    assert len(values) == 4
    assert ((t >= 0) & (t < 1)).all()


@pytest.mark.parametrize(
    "times", [StratifiedTimesteps("segment"), IndependentTimesteps("segment")], ids=str
)
def test_one_time_for_each_segment(times):
    batch = collate([document(4, 4, seed=s) for s in range(3)], VOCABULARY)
    t = times(batch, generator=rng())
    text = t[batch.only(Modality.TEXT).target].view(3, 4)
    image = t[batch.only(Modality.IMAGE).target].view(3, 4)
    assert (text == text[:, :1]).all()
    assert (image == image[:, :1]).all()
    assert len({*text[:, 0].tolist(), *image[:, 0].tolist()}) == 6


@pytest.mark.parametrize("per", ["document", "segment"])
def test_times_are_never_exactly_0(per):
    """As uniform draws are once in 16 million, at which losses have no value."""

    @dataclass(frozen=True)
    class Unlucky(Timesteps):
        def draw(self, present: Tensor, *, generator: torch.Generator) -> Tensor:
            return torch.zeros(present.shape)

    batch = packed()
    t = Unlucky(per)(batch, generator=rng())
    assert (t[batch.target] == 2.0**-25).all()
    for times in (StratifiedTimesteps(per), IndependentTimesteps(per)):
        drawn = times(batch, generator=rng())
        assert (drawn[batch.target] >= 2.0**-24).all()  # what is drawn otherwise is left as it is


def test_low_variance_times_cover_the_interval_evenly():
    batch = collate([document(3, 2, seed=s) for s in range(20)], VOCABULARY)
    for seed in range(5):
        t = StratifiedTimesteps()(batch, generator=rng(seed))[:, 3].sort().values
        torch.testing.assert_close(t.diff(), torch.full((19,), 1 / 20))
        segments = StratifiedTimesteps("segment")(batch, generator=rng(seed))
        for modality in (Modality.TEXT, Modality.IMAGE):
            times = segments[batch.only(modality).target].unique()
            torch.testing.assert_close(times.diff(), torch.full((19,), 1 / 20))


def test_low_variance_times_are_uniform_and_independent_between_segments():
    batch = collate([document(1, 1, seed=s) for s in range(4)], VOCABULARY)
    draws = torch.stack(
        [StratifiedTimesteps("segment")(batch, generator=rng(s)) for s in range(1500)]
    )
    text, image = draws[:, 0, batch.ids.shape[1] - 1], draws[:, 0, 1]
    for t in (text, image):
        histogram = torch.histc(t, bins=10, min=0, max=1) / len(t)
        torch.testing.assert_close(histogram, torch.full((10,), 0.1), atol=0.03, rtol=0)
    assert abs(float(torch.corrcoef(torch.stack([text, image]))[0, 1])) < 0.09


def test_rows_without_targets_take_no_time():
    batch = ragged()
    t = StratifiedTimesteps()(batch, generator=rng())
    assert (t[4] == 0).all()
    torch.testing.assert_close(t[:4].amax(1).sort().values.diff(), torch.full((3,), 0.25))


# ---- the bound ----------------------------------------------------------------------------------


@pytest.mark.parametrize("exact_count", [False, True])
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Polynomial(2), LogLinear(1e-4)], ids=str)
def test_weighted_cross_entropy_is_the_likelihood_of_a_factorized_model(
    schedule: MaskSchedule, exact_count: bool
):
    """For such a model the bound is tight, whatever the schedule."""
    denoiser = Factorized(torch.randn(8, VOCABULARY.size, generator=rng()))
    one = collate([document(3, 0, seed=4)], VOCABULARY)  # two borders, three tokens
    batch = copies(document(3, 0, seed=4), 20_000)
    objective = Objective(Absorbing(schedule, exact_count=exact_count))
    loss = objective(denoiser, batch, generator=rng()).sums["text"] / len(batch)
    log_prob = denoiser.logits[:, :TEXT].log_softmax(-1)
    exact = -sum(log_prob[place, one.ids[0, place]] for place in (2, 3, 4))
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.02)


# ---- sums and counts ----------------------------------------------------------------------------


def by_hand(
    denoiser: TinyDenoiser, batch: Batch, corruption, loss_normalization: LossNormalization
):
    """Sum and count of weighted cross-entropy over text, with loops."""
    text = batch.of(Modality.TEXT)
    everywhere = torch.ones_like(batch.target)
    hidden = denoiser.hidden(corruption.x_t, batch)
    logits = denoiser.logits_at(hidden, everywhere, ids=VOCABULARY.text)
    log_prob = logits.log_softmax(-1).view(*batch.ids.shape, -1)
    total, documents, targets, masked = 0.0, 0, 0, 0
    for row in range(len(batch)):
        for number in range(int(batch.document[row].max()) + 1):
            here = (batch.document[row] == number) & text[row] & batch.target[row]
            n = int(here.sum())
            if n == 0:
                continue
            documents, targets = documents + 1, targets + n
            places = (here & corruption.is_noised[row]).nonzero().flatten().tolist()
            masked += len(places)
            for place in places:
                value = -corruption.weight[row, place] * log_prob[row, place, batch.ids[row, place]]
                total += float(value) / (n if loss_normalization == "sequence" else 1)
    count = {"token": targets, "masked_token": masked}.get(loss_normalization, documents)
    return total, count


@pytest.mark.parametrize("loss_normalization", ["token", "masked_token", "sequence", "batch"])
@torch.no_grad()
def test_normalizers_by_hand(loss_normalization: LossNormalization):
    denoiser, batch = TinyDenoiser(), packed()
    objective = Objective(ABSORBING, text=ModalityLoss(WeightedCrossEntropy(), loss_normalization))
    corruption = objective.corrupt(batch, VOCABULARY, generator=rng())
    terms = objective.terms(denoiser, batch, corruption)
    total, count = by_hand(denoiser, batch, corruption, loss_normalization)
    assert float(terms.sums["text"]) == pytest.approx(total, rel=1e-5)
    assert int(terms.counts["text"]) == count


def test_counts_are_known_before_the_forward_pass():
    denoiser, batch = TinyDenoiser(), packed()
    objective = Objective(
        ABSORBING,
        text=ModalityLoss(loss_normalization="sequence"),
        image=ModalityLoss(CrossEntropy(), "masked_token"),
        complementary=True,
    )
    corruption = objective.corrupt(batch, VOCABULARY, generator=rng())
    counts = objective.counts(batch, corruption)
    assert denoiser.calls == 0
    terms = objective.terms(denoiser, batch, corruption)
    for name, count in counts.items():
        assert torch.equal(count, terms.counts[name])
        assert not count.requires_grad
        assert terms.sums[name].requires_grad
    assert int(counts["image"]) == int(batch.only(Modality.IMAGE).target.sum())


def test_complementary_rows_keep_their_features():
    batch = with_features()
    denoiser = TinyDenoiser()
    objective = Objective(
        ABSORBING, text=ModalityLoss(CrossEntropy(), "masked_token"), complementary=True
    )
    corruption = objective.corrupt(batch, VOCABULARY, generator=rng())
    both = objective.terms(denoiser, batch, corruption)
    halves = [
        objective.terms(
            denoiser,
            batch,
            type(corruption)(
                **{f: one.chunk(2)[i] for f, one in vars(corruption).items() if one is not None}
            ),
        )
        for i in (0, 1)
    ]
    torch.testing.assert_close(both.sums["text"], halves[0].sums["text"] + halves[1].sums["text"])


# ---- efficiency, ranges, packing ----------------------------------------------------------------


def test_one_pass_of_the_body_and_a_head_at_masked_tokens_only():
    denoiser, batch = TinyDenoiser(), ragged()
    objective = Objective(ABSORBING)
    corruption = objective.corrupt(batch, VOCABULARY, generator=rng())
    objective.terms(denoiser, batch, corruption)
    text = corruption.is_noised & batch.of(Modality.TEXT)
    image = corruption.is_noised & batch.of(Modality.IMAGE)
    assert denoiser.calls == 1
    assert denoiser.head_rows == [int(text.sum()), int(image.sum())]


def test_full_vocabulary_normalizes_over_all_ids():
    denoiser, batch = TinyDenoiser(), ragged()
    restricted, full = (
        Objective(ABSORBING, full_vocabulary=f)(denoiser, batch, generator=rng())
        for f in (False, True)
    )
    for name in ("text", "image"):
        assert float(full.sums[name].detach()) > float(restricted.sums[name].detach())

    denoiser.zero_grad()
    restricted.sums["image"].backward()
    columns = denoiser.head.grad.abs().sum(0)
    assert (columns[: VOCABULARY.image[0]] == 0).all()
    assert (columns[VOCABULARY.image[0] :] > 0).all()


@torch.no_grad()
def test_packed_is_unpacked():
    """The same noise gives the same loss, whether documents share a row or not."""
    documents = [document(n, k, seed=n, prompt=2) for n, k in ((20, 10), (7, 10), (9, 0), (2, 3))]
    objective = Objective(ABSORBING, text=ModalityLoss(loss_normalization="sequence"))
    together, alone = pack(documents, VOCABULARY, length=48), collate(documents, VOCABULARY)
    denoiser = TinyDenoiser()
    corruption = objective.corrupt(together, VOCABULARY, generator=rng())
    moved = objective.corrupt(alone, VOCABULARY, generator=rng())
    parts = {f: one.clone() for f, one in vars(moved).items() if one is not None}
    rows = {tuple(alone.ids[r, : len(d)].tolist()): r for r, d in enumerate(documents)}
    for row in range(len(together)):
        for number in range(int(together.document[row].max()) + 1):
            here = together.document[row] == number
            target_row = rows[tuple(together.ids[row, here].tolist())]
            for name, part in parts.items():
                part[target_row, : int(here.sum())] = getattr(corruption, name)[row, here]
    moved = type(moved)(**parts)
    a, b = objective.terms(denoiser, together, corruption), objective.terms(denoiser, alone, moved)
    for name in ("text", "image"):
        torch.testing.assert_close(a.sums[name], b.sums[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(a.counts[name], b.counts[name])


def test_text_only_model():
    vocabulary = Vocabulary.build(text_size=TEXT, eos_id=0)
    batch = collate([document(5, 0)], VOCABULARY)
    terms = Objective(ABSORBING)(TinyDenoiser(vocabulary), batch, generator=rng())
    assert float(terms.sums["image"]) == 0
    assert int(terms.counts["image"]) == 0


@pytest.mark.parametrize(
    "process",
    [
        Uniform(Linear()),
        TokenNeighbor(Cosine(), exact_count=True),
        PerModality(ABSORBING, Absorbing(Cosine(), exact_count=True, rounding="nearest")),
    ],
    ids=str,
)
def test_other_processes_train_too(process):
    denoiser, batch = TinyDenoiser(), ragged()
    objective = Objective(process, times=StratifiedTimesteps("segment"), complementary=True)
    terms = objective(denoiser, batch, generator=rng())
    (terms.sums["text"] + terms.sums["image"]).backward()
    assert all(torch.isfinite(p.grad).all() for p in denoiser.parameters())


def test_is_a_function_of_the_generator_and_mutates_nothing():
    denoiser, batch = TinyDenoiser(), ragged()
    ids = batch.ids.clone()
    a, b = (Objective(ABSORBING)(denoiser, batch, generator=rng(5)).sums["text"] for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(batch.ids, ids)


def test_refuses_normalizations_of_other_losses():
    with pytest.raises(ValueError, match="'mean' is not one of"):
        ModalityLoss(loss_normalization="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'constant' is not one of .*another kind of loss has it"):
        ModalityLoss(loss_normalization="constant")
