"""Complementary masks: both copies estimate the bound, by enumeration, or are refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from mmdlm.core.diffusion.forward import Absorbing
from mmdlm.core.diffusion.schedule import Cosine, Linear
from mmdlm.core.diffusion.spindle import Spindle
from mmdlm.core.likelihood.token_scores import token_log_prob
from mmdlm.core.losses.objective import ModalityLoss, Objective
from mmdlm.core.losses.token_losses import SpindleBound
from mmdlm.core.sequence import collate
from mmdlm.experimental.score_entropy import UniformScoreEntropy
from mmdlm.experimental.uniform import Uniform
from tests.core.fakes import VOCABULARY, Factorized, TinyDenoiser, copies, document, rng


def exact_objective(denoiser: TinyDenoiser, process: Absorbing, n: int) -> tuple[float, float]:
    """Loss of a document of n tokens in the first and the second copy, over all times and masks.

    Each count k of 1 .. n comes with the times between (k - 1) / n and k / n; a loss is that of
    the masks of k tokens that there are, all equally likely.
    """
    batch = copies(document(n, 0, seed=4), 64 * n)
    totals = [0.0, 0.0]
    for k in range(1, n + 1):
        t = torch.full((len(batch),), (k - 0.5) / n)
        first = process.corrupt(batch, t, VOCABULARY, generator=rng(k))
        second = process.complement(batch, first, VOCABULARY, generator=rng(k))
        for copy, one in enumerate((first, second)):
            log_prob = token_log_prob(denoiser, one.x_t, batch, where=one.is_noised)
            loss = -(one.weight * log_prob).sum(1)
            patterns, row = one.is_noised.unique(dim=0, return_inverse=True)
            assert len(patterns) == math.comb(n, k)
            each = torch.zeros(len(patterns)).scatter_(0, row, loss)
            totals[copy] += float(each.mean()) / n
    return totals[0], totals[1]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@torch.no_grad()
def test_complementary_masks_of_exact_counts_are_unbiased(n: int):
    """By enumeration of all counts and masks: each copy has the bound in its mean."""
    denoiser, batch = TinyDenoiser(), collate([document(n, 0, seed=4)], VOCABULARY)
    exact = 0.0
    places = batch.target[0].nonzero().flatten().tolist()
    for k in range(1, n + 1):
        for subset in itertools.combinations(places, k):
            where = torch.zeros_like(batch.target)
            where[0, list(subset)] = True
            x_t = batch.ids.masked_fill(where, VOCABULARY.mask_id)
            log_prob = token_log_prob(denoiser, x_t, batch, where=where)
            exact -= float(log_prob.sum()) / k / math.comb(n, k)
    first, second = exact_objective(denoiser, Absorbing(Linear(), exact_count=True), n)
    assert first == pytest.approx(exact, rel=1e-4)
    assert second == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("eps", [1e-3, 1e-2])
def test_weights_of_a_complement_are_bounded_as_those_of_the_first_copy(eps: float):
    """And the bias is the one that is stated."""
    schedule = Linear(eps)
    t = (torch.arange(400_000) + 0.5) / 400_000
    batch = copies(document(1, 0), len(t))
    first = Absorbing(schedule).corrupt(batch, t, VOCABULARY, generator=rng())
    second = Absorbing(schedule).complement(batch, first, VOCABULARY, generator=rng())
    most = float(schedule.weight(torch.zeros(())))
    assert float(first.weight.max()) <= most
    assert most / 2 < float(second.weight.max()) <= most * (1 + 1e-6)
    parts = [float((one.weight * one.p_mask)[:, -1].double().mean()) for one in (first, second)]
    assert parts[0] == pytest.approx(1 - eps, abs=1e-6)
    assert parts[1] == pytest.approx(1 - 1.5 * eps, abs=1e-5)


def test_bounds_that_complementary_masks_have_none_of_are_refused(tmp_path: Path):
    (tmp_path / "counts.pt").touch()
    for process, loss in (
        (Spindle(tmp_path / "counts.pt"), SpindleBound()),
        (Uniform(Linear(), cover_all=True), UniformScoreEntropy()),
    ):
        text = ModalityLoss(loss)
        Objective(process, text=text, image=text)
        with pytest.raises(ValueError, match="set complementary to false"):
            Objective(process, text=text, image=text, complementary=True)


def test_complementary_masks_keep_the_bound():
    denoiser = Factorized(torch.randn(8, VOCABULARY.size, generator=rng()))
    batch = copies(document(3, 0, seed=4), 20_000)
    once, twice = (
        Objective(Absorbing(Cosine()), complementary=c)(denoiser, batch, generator=rng())
        for c in (False, True)
    )
    mean_once = once.sums["text"] / once.counts["text"]
    mean_twice = twice.sums["text"] / twice.counts["text"]
    assert int(twice.counts["text"]) == 2 * int(once.counts["text"])
    torch.testing.assert_close(mean_twice, mean_once, rtol=0.03, atol=0)
