"""Estimates agree with what is computed exactly, and one set of views serves several models."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch

from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.coupled import Coupled
from mmdlm.core.likelihood.elbo import Elbo
from mmdlm.core.likelihood.mean_field import OneStepMeanField
from mmdlm.core.likelihood.structured import StructuredNoise, spread_timesteps
from mmdlm.core.likelihood.token_scores import token_log_prob
from mmdlm.core.likelihood.trajectory import TrajectoryReplay
from mmdlm.core.sampling.order import Random
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import Batch, collate, pack
from mmdlm.core.vocabulary import Modality
from mmdlm.experimental.block_random import BlockRandom
from tests.core.fakes import (
    VOCABULARY,
    Factorized,
    TinyDenoiser,
    copies,
    document,
    ragged,
    rng,
    with_features,
)

ESTIMATORS: list[LikelihoodEstimator] = [
    OneStepMeanField(prompt_mask_prob=0.5),
    StructuredNoise(),
    Coupled(),
    TrajectoryReplay(),
    TrajectoryReplay(shrink=3),
    TrajectoryReplay(shrink=2, views=2),
    Elbo(repeats=2, strata=2, masks=2),
    BlockRandom(block_length=3, views=3, prompt_mask_prob=0.5),
]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=map(str, ESTIMATORS))


def rollout_steps(batch: Batch) -> torch.Tensor:
    """Steps as a sampler leaves them: some targets share one, and rows end at different ones."""
    sampler = Sampler(steps=7, order=Random(), temperature=1.0)
    return sampler(TinyDenoiser(), batch, generator=rng(5)).steps


def subsets(places: list[int], *sizes: int) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(places, size) for size in sizes))


@torch.no_grad()
def log_prob_of(denoiser, batch: Batch, masked: tuple[int, ...], hidden=()) -> torch.Tensor:
    """[L] of the masked places of a batch of one row, 0 elsewhere."""
    where = torch.zeros_like(batch.target)
    where[0, list(masked)] = True
    gone = where.clone()
    gone[0, list(hidden)] = True
    x_t = batch.ids.masked_fill(gone, VOCABULARY.mask_id)
    return token_log_prob(denoiser, x_t, batch, where=where)[0]


@torch.no_grad()
def many(estimator, denoiser, document, n: int = 4000, **options) -> torch.Tensor:
    """[n, L] independent estimates of one document."""
    batch = copies(document, n)
    if "scored" in options:
        options["scored"] = options["scored"].expand(n, -1)
    (views,) = estimator.draw(batch, VOCABULARY, generator=rng(11), **options)
    return estimator.log_prob(denoiser, batch, views)


def assert_mean(samples: torch.Tensor, exact: torch.Tensor) -> None:
    """Samples [n, L] have the mean `exact` [L]."""
    error = (samples.std(0) / len(samples) ** 0.5).clamp_min(1e-5)
    deviation = (samples.mean(0) - exact).abs() / error
    assert deviation.max() < 4.5, deviation


@torch.no_grad()
def exact_nelbo(denoiser, batch: Batch) -> float:
    """Of a batch of one document, over all subsets of its targets."""
    places = batch.target[0].nonzero().flatten().tolist()
    total = 0.0
    for k in range(1, len(places) + 1):
        subsets = list(combinations(places, k))
        for subset in subsets:
            where = torch.zeros_like(batch.target)
            where[0, list(subset)] = True
            x_t = batch.ids.masked_fill(where, VOCABULARY.mask_id)
            log_prob = token_log_prob(denoiser, x_t, batch, where=where)
            total -= float(log_prob.sum()) / k / len(subsets)
    return total


def test_agrees_with_enumeration():
    denoiser = TinyDenoiser()
    documents = [document(4, 0, seed=1, prompt=3), document(3, 2, seed=2), document(1, 0, seed=3)]
    batch = pack(documents, VOCABULARY, length=11)
    nelbo = Elbo(repeats=40, strata=20, at_once=20).nelbo(denoiser, batch, generator=rng())
    found = 0
    for row in range(len(batch)):
        for number in range(int(batch.document[row].max()) + 1):
            ids = batch.ids[row, batch.document[row] == number].tolist()
            alone = next(
                b for b in (collate([d], VOCABULARY) for d in documents) if b.ids[0].tolist() == ids
            )
            exact = exact_nelbo(denoiser, alone)
            error = max(float(nelbo.standard_error[row, number]), 1e-5)
            assert abs(float(nelbo.value[row, number]) - exact) < 4 * error
            assert int(nelbo.tokens[row, number]) == int(alone.target.sum())
            found += 1
    assert found == 3


def test_error_bars_are_honest():
    """Estimates from many seeds scatter as much as each of them says."""
    denoiser, batch = TinyDenoiser(), collate([document(5, 0, seed=1, prompt=2)], VOCABULARY)
    estimates = [
        Elbo(repeats=6, strata=4, at_once=24).nelbo(denoiser, batch, generator=rng(s))
        for s in range(150)
    ]
    spread = torch.stack([e.value[0, 0] for e in estimates]).std()
    claimed = torch.stack([e.standard_error[0, 0] for e in estimates]).square().mean().sqrt()
    assert 0.8 < float(spread / claimed) < 1.25


def test_is_the_likelihood_of_a_factorized_model():
    denoiser = Factorized(torch.randn(16, VOCABULARY.size, generator=rng()))
    batch = collate([document(6, 4, seed=1), document(2, 0, seed=2)], VOCABULARY)
    everything = token_log_prob(denoiser, batch.ids, batch, where=batch.target).sum(1).detach()
    nelbo = Elbo(repeats=100, strata=12, at_once=50).nelbo(denoiser, batch, generator=rng())
    error = (nelbo.value[:, 0] + everything).abs() / nelbo.standard_error[:, 0]
    assert (error < 4).all()


def test_strata_lower_the_variance():
    denoiser, batch = TinyDenoiser(), collate([document(5, 0, seed=1, prompt=2)], VOCABULARY)
    errors = [
        Elbo(repeats=n, strata=s, at_once=50).nelbo(denoiser, batch, generator=rng())
        for n, s in ((400, 1), (40, 10))
    ]
    assert float(errors[1].standard_error[0, 0]) < float(errors[0].standard_error[0, 0])


def test_token_values_add_up_and_carry_gradient():
    denoiser, batch = TinyDenoiser(), ragged()
    estimator = Elbo(repeats=2, strata=3)
    log_prob = estimator(denoiser, batch, generator=rng())
    assert log_prob.shape == batch.ids.shape
    assert (log_prob[~batch.target] == 0).all()
    nelbo = estimator.nelbo(denoiser, batch, generator=rng())
    torch.testing.assert_close(-log_prob.detach().sum(1), nelbo.value.sum(1))
    log_prob.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in denoiser.parameters())


@torch.no_grad()
def test_draws_at_once_do_not_depend_on_their_grouping_in_the_mean():
    denoiser, batch = TinyDenoiser(), ragged()
    one, many = (
        Elbo(repeats=60, strata=8, at_once=n).nelbo(denoiser, batch, generator=rng(1))
        for n in (1, 7)
    )
    error = (one.standard_error.square() + many.standard_error.square()).sqrt()[:4, 0]
    assert ((one.value - many.value)[:4, 0].abs() < 4 * error).all()


def test_full_vocabulary_is_less_likely():
    denoiser, batch = TinyDenoiser(), ragged()
    with torch.no_grad():
        inside = token_log_prob(denoiser, batch.ids, batch, where=batch.target)
        outside = token_log_prob(
            denoiser, batch.ids, batch, where=batch.target, full_vocabulary=True
        )
    assert (outside[batch.target] < inside[batch.target]).all()


def test_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="strata must be at least 1, got 0"):
        Elbo(strata=0)
    with pytest.raises(ValueError, match="at least 2 repeats"):
        Elbo(repeats=1).nelbo(TinyDenoiser(), ragged(), generator=rng())


# ---- views --------------------------------------------------------------------------------------


@every_estimator
@pytest.mark.parametrize("batch", [ragged(), with_features()], ids=["ragged", "features"])
def test_views_mask_what_they_cover_and_leave_the_rest(estimator, batch: Batch):
    steps, mask_id = rollout_steps(batch), VOCABULARY.mask_id
    scored = batch.target & (torch.arange(batch.ids.shape[1]) % 3 > 0)
    plan = estimator.draw(
        batch, VOCABULARY, generator=rng(), iterations=3, scored=scored, steps=steps
    )
    assert len(plan) == 3
    for view in chain(*plan):
        assert not (view.covered & ~scored).any()
        masked = view.x_t == mask_id
        assert masked[view.covered].all()
        assert (view.x_t == batch.ids)[~masked].all()
        assert (view.weight[~view.covered] == 0).all()
        assert (view.weight[view.covered] > 0).all()
        generated = batch.of(Modality.TEXT) | batch.of(Modality.IMAGE)
        assert not (masked & ~generated).any()  # structure, slots and padding stay
        if not isinstance(estimator, TrajectoryReplay):  # a replay shows what the sampler saw
            assert masked[batch.target & ~scored].all()
        if not isinstance(estimator, OneStepMeanField | BlockRandom):
            assert not (masked & ~batch.target).any()


@every_estimator
def test_the_head_runs_at_covered_places_alone(estimator):
    batch = ragged()
    (views,) = estimator.draw(batch, VOCABULARY, generator=rng(), steps=rollout_steps(batch))
    denoiser = TinyDenoiser()
    scores = estimator.scores(denoiser, batch, views)
    assert sum(denoiser.head_rows) == sum(int(view.covered.sum()) for view in views)
    assert denoiser.calls == len(views)
    assert (scores.log_prob[~scores.covered] == 0).all()
    assert (scores.log_prob[scores.covered] < 0).all()
    for modality in (Modality.TEXT, Modality.IMAGE):
        assert (scores.anywhere & batch.of(modality)).any()


@every_estimator
def test_is_a_function_of_the_generator(estimator):
    batch = ragged()
    one, two, other = (
        estimator.draw(
            batch, VOCABULARY, generator=rng(seed), iterations=2, steps=rollout_steps(batch)
        )
        for seed in (1, 1, 2)
    )
    assert all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(chain(*one), chain(*two), strict=True)
        for name in ("x_t", "covered", "weight")
    )
    if not (isinstance(estimator, TrajectoryReplay) and estimator.views is None):
        assert any(
            not torch.equal(a.x_t, b.x_t) for a, b in zip(chain(*one), chain(*other), strict=True)
        )


@every_estimator
def test_views_at_once_change_nothing(estimator):
    batch, denoiser = ragged(), TinyDenoiser()
    (views,) = estimator.draw(batch, VOCABULARY, generator=rng(), steps=rollout_steps(batch))
    one = estimator.scores(denoiser, batch, views, entropy=True)
    denoiser.calls = 0
    all_ = replace(estimator, at_once=64).scores(denoiser, batch, views, entropy=True)
    assert denoiser.calls == 1
    torch.testing.assert_close(one.log_prob, all_.log_prob)
    torch.testing.assert_close(one.entropy, all_.entropy)


@every_estimator
def test_full_vocabulary_is_an_option_of_all(estimator):
    batch, denoiser = ragged(), TinyDenoiser()
    (views,) = estimator.draw(batch, VOCABULARY, generator=rng(), steps=rollout_steps(batch))
    inside = estimator.log_prob(denoiser, batch, views)
    outside = replace(estimator, full_vocabulary=True).log_prob(denoiser, batch, views)
    covered = inside != 0
    assert (outside[covered] < inside[covered]).all()


def test_entropy_is_that_of_the_distribution():
    denoiser = Factorized(torch.randn(16, VOCABULARY.size, generator=rng()))
    batch = collate([document(3, 2, seed=1)], VOCABULARY)
    estimator = OneStepMeanField(prompt_mask_prob=0)
    (views,) = estimator.draw(batch, VOCABULARY, generator=rng())
    scores = estimator.scores(denoiser, batch, views, entropy=True)
    for column in batch.target[0].nonzero().flatten().tolist():
        start, stop = VOCABULARY.range(Modality(int(batch.modality[0, column])))
        logits = denoiser.logits[column, start:stop]
        expected = torch.distributions.Categorical(logits=logits).entropy().detach()
        torch.testing.assert_close(scores.entropy[0, 0, column], expected)
    assert not scores.entropy.requires_grad
    assert scores.log_prob.requires_grad


# ---- means, against enumeration -----------------------------------------------------------------

DOCUMENT = document(4, 0, seed=1, prompt=3)
PLACES = [5, 6, 7, 8]  # of the targets: three of the prompt and two image markers come before
CONTEXT = [0, 1, 2]


@torch.no_grad()
def test_mean_field_is_unbiased_for_the_mean_over_masked_contexts():
    denoiser, batch, p = TinyDenoiser(), collate([DOCUMENT], VOCABULARY), 0.3
    exact = sum(
        p ** len(hidden)
        * (1 - p) ** (3 - len(hidden))
        * log_prob_of(denoiser, batch, tuple(PLACES), hidden)
        for hidden in subsets(CONTEXT, 0, 1, 2, 3)
    )
    assert_mean(many(OneStepMeanField(prompt_mask_prob=p), denoiser, DOCUMENT), exact)
    clean = OneStepMeanField(prompt_mask_prob=0)(denoiser, batch, generator=rng())[0]
    torch.testing.assert_close(clean, log_prob_of(denoiser, batch, tuple(PLACES)))


@torch.no_grad()
def test_structured_is_unbiased_for_its_mixture_of_noise_levels():
    denoiser, batch = TinyDenoiser(), collate([DOCUMENT], VOCABULARY)
    sizes = [1, 1, 2, 3, 4]  # at 0, 1, ... 4 of 4 timesteps: one at least
    exact = sum(
        log_prob_of(denoiser, batch, subset) / len(subsets(PLACES, size)) / len(sizes)
        for size in sizes
        for subset in subsets(PLACES, size)
    )
    assert_mean(many(StructuredNoise(total=4), denoiser, DOCUMENT), exact)


@torch.no_grad()
def test_coupled_is_unbiased_for_its_three_noise_levels():
    denoiser, batch, t = TinyDenoiser(), collate([DOCUMENT], VOCABULARY), 0.3
    exact = log_prob_of(denoiser, batch, tuple(PLACES)) / 2
    for mask in subsets(PLACES, 0, 1, 2, 3, 4):
        chance = t ** len(mask) * (1 - t) ** (4 - len(mask))
        complement = tuple(place for place in PLACES if place not in mask)
        exact += chance * 0.5 / t * log_prob_of(denoiser, batch, mask)
        exact += chance * 0.5 / (1 - t) * log_prob_of(denoiser, batch, complement)
    assert_mean(many(Coupled(low=t, high=t), denoiser, DOCUMENT), exact)


@torch.no_grad()
@pytest.mark.parametrize("scored", [(5, 6, 7, 8), (5, 6, 7)])
def test_elbo_is_unbiased_for_the_bound(scored: tuple[int, ...]):
    denoiser, batch = TinyDenoiser(), collate([DOCUMENT], VOCABULARY)
    behind = tuple(place for place in PLACES if place not in scored)
    exact = sum(
        log_prob_of(denoiser, batch, subset, behind) / size / len(subsets(list(scored), size))
        for size in range(1, len(scored) + 1)
        for subset in subsets(list(scored), size)
    )
    where = torch.zeros_like(batch.target)
    where[0, list(scored)] = True
    for estimator in (Elbo(repeats=1, strata=1), Elbo(repeats=2, strata=1, masks=2)):
        assert_mean(many(estimator, denoiser, DOCUMENT, scored=where), exact)
    if not behind:
        assert float(exact.sum()) == pytest.approx(-exact_nelbo(denoiser, batch), rel=1e-4)


@torch.no_grad()
def test_masks_share_their_count():
    batch = copies(DOCUMENT, 5)
    (views,) = Elbo(repeats=3, strata=1, masks=4).draw(batch, VOCABULARY, generator=rng())
    counts = torch.stack([view.covered.sum(1) for view in views]).view(3, 4, 5)
    assert (counts == counts[:, :1]).all()
    assert counts[:, 0].unique().numel() > 1
    weight = torch.stack([view.weight for view in views]).sum((0, 2))
    torch.testing.assert_close(weight, torch.full((5,), 4.0))  # the weights count every target once


@torch.no_grad()
def test_all_are_exact_where_tokens_do_not_depend_on_each_other():
    denoiser = Factorized(torch.randn(16, VOCABULARY.size, generator=rng()))
    batch = collate([document(6, 4, seed=1), document(2, 0, seed=2)], VOCABULARY)
    exact = token_log_prob(denoiser, batch.ids, batch, where=batch.target)
    steps = rollout_steps(batch)
    for estimator in (OneStepMeanField(), TrajectoryReplay(), TrajectoryReplay(shrink=4)):
        (views,) = estimator.draw(batch, VOCABULARY, generator=rng(), steps=steps)
        torch.testing.assert_close(estimator.log_prob(denoiser, batch, views), exact)
    (last,) = StructuredNoise().draw(batch, VOCABULARY, generator=rng(), iterations=4)[-1]
    torch.testing.assert_close(StructuredNoise().log_prob(denoiser, batch, [last]), exact)


# ---- UniGRPO's timesteps ------------------------------------------------------------------------


def test_timesteps_are_those_of_the_formula():
    """The example of the paper (100, 300, 500, 700, 900) does not follow from its own formula."""
    assert spread_timesteps(torch.tensor(100), 5, 1000).tolist() == [100, 325, 550, 775, 1000]
    assert spread_timesteps(torch.tensor([0, 1, 1000]), 4, 1000).T.tolist() == [
        [0, 333, 666, 1000],
        [1, 334, 667, 1000],
        [1000, 1000, 1000, 1000],
    ]
    assert spread_timesteps(torch.tensor(7), 1, 1000).tolist() == [7]


def test_structured_masks_ever_more_until_all_is_masked():
    batch = ragged()
    plan = StructuredNoise().draw(batch, VOCABULARY, generator=rng(3), iterations=5)
    counts = torch.stack([views[0].covered.sum(1) for views in plan])  # [iterations, B]
    targets = batch.target.sum(1)
    assert (counts[1:] >= counts[:-1]).all()
    assert torch.equal(counts[-1], targets)
    assert (counts[0][targets > 0] >= 1).all()
    first = counts[0].double()
    expected = first[None] + (targets - first)[None] * torch.arange(5)[:, None] / 4
    assert ((counts - expected).abs() <= 1).all()  # evenly spread, up to rounding


# ---- traces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [ragged(), with_features()], ids=["ragged", "features"])
@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(steps=8, temperature=1.0),
        Sampler(steps=40, block_length=4, order=Random(), temperature=0.7),
    ],
    ids=["confidence", "blocks"],
)
@torch.no_grad()
def test_a_trace_gives_the_log_probabilities_at_which_tokens_were_committed(batch, sampler):
    denoiser = TinyDenoiser()
    out = sampler(denoiser, batch, generator=rng(4))
    filled = replace(batch, ids=out.ids)
    estimator = TrajectoryReplay()
    (views,) = estimator.draw(filled, VOCABULARY, generator=rng(), steps=out.steps)
    torch.testing.assert_close(estimator.log_prob(denoiser, filled, views), out.log_prob)
    assert (out.log_prob[batch.target] < 0).all()
    assert (out.log_prob[~batch.target] == 0).all()


def test_shrink_merges_neighboring_steps_of_a_row():
    batch = copies(document(6, 0, seed=1), 2)
    places = batch.target[0].nonzero().flatten()
    steps = torch.full_like(batch.ids, -1)
    steps[0, places] = torch.tensor([0, 9, 9, 4, 20, 4])  # four steps: 0, 4, 9, 20
    steps[1, places] = torch.tensor([3, 3, 3, 3, 3, -1])  # one step, and one never committed
    (views,) = TrajectoryReplay(shrink=3).draw(batch, VOCABULARY, generator=rng(), steps=steps)
    covered = [view.covered[:, places].tolist() for view in views]
    yes, no = True, False
    assert covered == [
        [[yes, yes, yes, yes, no, yes], [yes, yes, yes, yes, yes, no]],
        [[no, no, no, no, yes, no], [no] * 6],
    ]
    masked = [(view.x_t == VOCABULARY.mask_id)[:, places].tolist() for view in views]
    assert masked[0] == [[yes] * 6] * 2
    assert masked[1][0] == [no, no, no, no, yes, no]


def test_views_take_turns_until_each_step_had_its_own():
    batch = copies(document(7, 0, seed=1), 3)
    places = batch.target[0].nonzero().flatten()
    steps = torch.full_like(batch.ids, -1)
    steps[:, places] = torch.stack(
        [torch.arange(7), torch.arange(7) // 2, torch.zeros(7, dtype=torch.int64)]
    )
    plan = TrajectoryReplay(views=2).draw(
        batch, VOCABULARY, generator=rng(), iterations=4, steps=steps
    )
    assert [len(views) for views in plan] == [2, 2, 2, 2]
    covered = torch.stack([view.covered for view in chain(*plan)]).sum(0)  # [B, L]
    assert (covered[0, places] >= 1).all()  # 7 steps in 8 views: one comes twice
    assert int(covered[0, places].sum()) == 8
    assert (covered[1, places] == 2).all()  # 4 steps, twice each
    assert (covered[2, places] == 4).all()  # its one step in each iteration, and no more


def test_a_trace_needs_a_rollout():
    with pytest.raises(
        ValueError, match="TrajectoryReplay: it replays a rollout, and none was given"
    ):
        TrajectoryReplay()(TinyDenoiser(), ragged(), generator=rng())


# ---- blocks -------------------------------------------------------------------------------------


def test_block_random_leaves_what_is_before_clean_and_hides_what_is_behind():
    batch = copies(document(11, 0, seed=1, prompt=2), 200)
    estimator = BlockRandom(block_length=4, views=3, prompt_mask_prob=0)
    (views,) = estimator.draw(batch, VOCABULARY, generator=rng())
    places = batch.target[0].nonzero().flatten()
    seen = set()
    for view in views:
        masked = (view.x_t == VOCABULARY.mask_id)[:, places]  # [B, 11]
        assert torch.equal(view.covered[:, places], masked)
        for row in masked.tolist():
            first = row.index(True) // 4
            assert all(row[4 * (first + 1) :])
            seen.add((first, sum(row[4 * first : 4 * first + 4])))
    assert seen == {(b, k) for b in range(3) for k in range(1, (4, 4, 3)[b] + 1)}
    weight = torch.stack([view.weight for view in views]).sum((0, 2))
    torch.testing.assert_close(weight, torch.full((200,), 11.0))
    started = torch.stack(
        [(view.x_t == VOCABULARY.mask_id)[:, places].float().argmax(1) // 4 for view in views]
    )
    assert (started.sort(0).values == torch.arange(3)[:, None]).all()  # each block once


# ---- one set of noise ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "estimator",
    [
        OneStepMeanField(prompt_mask_prob=0.5),
        StructuredNoise(),
        Coupled(),
        Elbo(repeats=1, strata=1),
        BlockRandom(block_length=2, prompt_mask_prob=0.3),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_shared_views_lower_the_variance_of_the_log_ratio(estimator):
    """By far: what a policy and its old self agree on cancels, view by view."""
    old, policy = TinyDenoiser(), TinyDenoiser()
    for parameter in policy.parameters():
        parameter += 0.01 * torch.randn(parameter.shape, generator=rng(1))
    batch = copies(document(5, 3, seed=1, prompt=3), 600)
    shared, own = (estimator.draw(batch, VOCABULARY, generator=rng(seed))[0] for seed in (1, 2))
    of_old = estimator.log_prob(old, batch, shared).sum(1)
    together = (estimator.log_prob(policy, batch, shared).sum(1) - of_old).var()
    apart = (estimator.log_prob(policy, batch, own).sum(1) - of_old).var()
    assert float(together) < float(apart) / 50, (float(together), float(apart))


@every_estimator
@torch.no_grad()
def test_the_same_model_on_the_same_views_has_a_ratio_of_exactly_one(estimator):
    batch, denoiser = ragged(), TinyDenoiser()
    plan = estimator.draw(
        batch, VOCABULARY, generator=rng(), iterations=2, steps=rollout_steps(batch)
    )
    for views in plan:
        old = estimator.log_prob(denoiser, batch, views)
        assert torch.equal((estimator.log_prob(denoiser, batch, views) - old).exp(), old**0)


def test_estimators_refuse_what_makes_no_sense():
    for make, message in (
        (
            lambda: OneStepMeanField(prompt_mask_prob=1.5),
            "OneStepMeanField: prompt_mask_prob must lie in",
        ),
        (
            lambda: OneStepMeanField(at_once=0),
            "OneStepMeanField: at_once must be at least 1, got 0",
        ),
        (lambda: StructuredNoise(total=0), "StructuredNoise: total must be at least 1"),
        (lambda: Coupled(low=0.0), "Coupled: 0 < low <= high < 1 is needed"),
        (lambda: TrajectoryReplay(shrink=0), "TrajectoryReplay: shrink must be at least 1"),
        (lambda: TrajectoryReplay(views=0), "TrajectoryReplay: views must be at least 1"),
        (lambda: BlockRandom(block_length=0), "BlockRandom: block_length must be at least 1"),
        (lambda: Elbo(masks=0), "Elbo: masks must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_batch_without_targets_is_scored_as_nothing():
    batch = collate([document(0, 0, prompt=3)], VOCABULARY)
    for estimator in ESTIMATORS:
        steps = torch.full_like(batch.ids, -1)
        (views,) = estimator.draw(batch, VOCABULARY, generator=rng(), steps=steps)
        assert (estimator.log_prob(TinyDenoiser(), batch, views) == 0).all()
