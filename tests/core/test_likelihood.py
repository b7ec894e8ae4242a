"""The Monte Carlo bound agrees with the bound computed exactly, and its error bars are honest."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from mmdlm.core.likelihood import Elbo, token_log_prob
from mmdlm.core.sequence import Batch, collate, pack
from tests.core.fakes import VOCABULARY, Factorised, TinyDenoiser, document, ragged, rng


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


def test_is_the_likelihood_of_a_factorised_model():
    denoiser = Factorised(torch.randn(16, VOCABULARY.size, generator=rng()))
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
