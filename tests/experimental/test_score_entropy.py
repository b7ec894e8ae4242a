"""Score entropy is the published expression, and the bound where it is one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.diffusion.forward import Absorbing, PerModality
from mmdlm.core.diffusion.schedule import Cosine, Linear, MaskSchedule, Shifted
from mmdlm.core.losses.objective import ModalityLoss, Objective
from mmdlm.core.losses.token_losses import Tokens, WeightedCrossEntropy
from mmdlm.core.sequence import collate
from mmdlm.experimental.score_entropy import ScoreEntropy, UniformScoreEntropy
from mmdlm.experimental.uniform import Uniform
from tests.core.fakes import TEXT, VOCABULARY, Factorized, document, rng


def tokens(m: int, size: int, *, weight: float = 1.0) -> Tokens:
    x_0 = torch.randint(size, (m,), generator=rng())
    return Tokens(
        x_0=x_0,
        x_t=torch.randint(size, (m,), generator=rng(1)),
        p_mask=torch.rand(m, generator=rng(2)),
        slope=torch.ones(m),
        weight=torch.full((m,), weight),
    )


def test_score_entropy_is_cross_entropy_where_scores_are_normalized():
    logits, these = torch.randn(50, 9, generator=rng()), tokens(50, 9, weight=1.7)
    normalized = logits.log_softmax(-1) + math.log(9)
    torch.testing.assert_close(
        ScoreEntropy()(normalized, these), WeightedCrossEntropy()(normalized, these)
    )
    assert (ScoreEntropy()(logits, these) >= WeightedCrossEntropy()(logits, these)).all()


@pytest.mark.parametrize("p_mask", [1e-3, 0.3, 0.9])
def test_score_entropy_is_the_published_expression(p_mask: float):
    """sigma' * (sum_y s_y - r log s_{x_0} + K(r)), with s = alpha / p_mask * exp(logits) / R."""
    logits = torch.randn(20, 9, generator=rng(), dtype=torch.float64)
    these = tokens(20, 9)
    alpha, slope = 1 - p_mask, 0.8
    ratio, sigma_slope = alpha / p_mask, slope / alpha
    score = ratio * logits.exp() / 9
    chosen = score.gather(1, these.x_0[:, None])[:, 0]
    expected = score.sum(1) - ratio * chosen.log() + ratio * (math.log(ratio) - 1)
    weighted = replace(these, weight=torch.full((20,), slope / p_mask))
    actual = ScoreEntropy()(logits, weighted)
    torch.testing.assert_close(actual, (sigma_slope * expected).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p_mask", [0.05, 0.5, 0.95])
def test_uniform_score_entropy_is_the_published_expression(p_mask: float):
    size, slope = 6, 0.8
    alpha = 1 - p_mask
    logits = torch.randn(40, size, generator=rng(), dtype=torch.float64)
    these = tokens(40, size)
    these = replace(
        these,
        p_mask=torch.full((40,), p_mask),
        slope=torch.full((40,), slope),
        weight=torch.full((40,), slope / p_mask),
    )

    def ratios(pi: Tensor) -> Tensor:
        p_t = alpha * pi + p_mask / size  # marginal at time t of a token with prior pi
        return p_t / p_t.gather(1, these.x_t[:, None])

    s, r = ratios(logits.softmax(-1)), ratios(F.one_hot(these.x_0, size).double())
    terms = s - r * s.log() + r * (r.log() - 1)
    terms.scatter_(1, these.x_t[:, None], 0.0)
    expected = slope / alpha / size * terms.sum(1)
    actual = UniformScoreEntropy()(logits, these)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)


def test_uniform_score_entropy_is_tight_for_the_true_posterior():
    """A single token's posterior given all others is its prior: the bound is then its entropy."""
    prior = torch.tensor([0.5, 0.3, 0.15, 0.05])
    p = torch.linspace(0, 1, 2001)[:-1] + 1 / 4000  # linear schedule, midpoints
    total = 0.0
    for x_0 in range(4):
        for x_t in range(4):
            here = p / 4 + (1 - p) * (x_0 == x_t)
            these = Tokens(
                x_0=torch.full_like(p, x_0).long(),
                x_t=torch.full_like(p, x_t).long(),
                p_mask=p,
                slope=torch.ones_like(p),
                weight=1 / p,
            )
            loss = UniformScoreEntropy()(prior.log().expand(len(p), 4), these)
            total += float(prior[x_0] * (here * loss).mean())
    assert total == pytest.approx(-float((prior * prior.log()).sum()), rel=1e-3)


@pytest.mark.parametrize("loss", [WeightedCrossEntropy(), ScoreEntropy(), UniformScoreEntropy()])
def test_losses_and_gradients_are_finite_at_both_ends(loss):
    for p in (0.0, 1e-38, 1e-7, 1 - 1e-7, 1.0):
        p_mask = torch.full((8,), p)
        weight = Linear().weight(p_mask.clamp_min(2.0**-24))  # what can be masked at all
        logits = torch.randn(8, 5, generator=rng(), requires_grad=True)
        these = replace(tokens(8, 5), p_mask=p_mask, weight=weight)
        value = loss(logits, these).sum()
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Shifted(3.0), Linear(1e-3)], ids=str)
def test_uniform_score_entropy_at_time_0_is_the_limit(schedule: MaskSchedule):
    """All is clean there; with its gradient it is what stands just beside it."""
    denoiser = Factorized(torch.randn(8, VOCABULARY.size, generator=rng()))
    batch = collate([document(3, 0, seed=4)], VOCABULARY)
    loss = ModalityLoss(UniformScoreEntropy())
    objective = Objective(Uniform(schedule, cover_all=True), text=loss)
    found = []
    for time in (0.0, 2.0**-22):
        corruption = objective.process.corrupt(
            batch, torch.full((1,), time), VOCABULARY, generator=rng()
        )
        assert torch.equal(corruption.x_t, batch.ids)
        denoiser.zero_grad()
        value = objective.terms(denoiser, batch, corruption).sums["text"]
        value.backward()
        found.append((value.detach(), denoiser.logits.grad.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    if schedule.p_mask(torch.zeros(())) == 0:
        x_0 = batch.ids[batch.target]
        pi = denoiser.logits[2:5, :TEXT].softmax(-1)[torch.arange(3), x_0].detach()
        limit = schedule.slope(torch.zeros(())) / TEXT * (1 / pi - 1).sum()
        torch.testing.assert_close(found[0][0], limit, rtol=1e-4, atol=0)


def test_refuses_losses_that_do_not_fit_the_process():
    scores = ModalityLoss(ScoreEntropy())
    uniform_scores = ModalityLoss(UniformScoreEntropy())
    everything = Uniform(Linear(), cover_all=True)
    with pytest.raises(ValueError, match="ScoreEntropy is for the Absorbing process"):
        Objective(Uniform(Linear()), text=scores)
    with pytest.raises(ValueError, match="cover_all=True"):
        Objective(Uniform(Linear()), text=uniform_scores, image=uniform_scores)
    with pytest.raises(ValueError, match="full_vocabulary"):
        Objective(everything, text=uniform_scores, image=uniform_scores, full_vocabulary=True)
    counted = replace(everything, exact_count=True)
    with pytest.raises(ValueError, match="set exact_count of the process to false"):
        Objective(counted, text=uniform_scores, image=uniform_scores)
    Objective(PerModality(everything, Absorbing(Linear())), text=uniform_scores, image=scores)
