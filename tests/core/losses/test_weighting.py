"""CART counts the clean tokens near a masked one, and nothing of other documents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmdlm.core.diffusion.forward import Absorbing
from mmdlm.core.diffusion.schedule import Linear
from mmdlm.core.losses.objective import ModalityLoss, Objective
from mmdlm.core.losses.token_losses import CrossEntropy, WeightedCrossEntropy
from mmdlm.core.losses.weighting import Bound, ContextAdaptive
from mmdlm.core.sequence import Batch, pack
from mmdlm.experimental.uniform import Uniform
from tests.core.fakes import VOCABULARY, TinyDenoiser, document, ragged, rng


def packed() -> Batch:
    documents = [document(n, k, seed=n, prompt=2) for n, k in ((20, 10), (7, 10), (9, 0), (2, 3))]
    return pack(documents, VOCABULARY, length=48)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("batch", [packed(), ragged()], ids=["packed", "ragged"])
def test_it_is_the_double_sum(p: float, batch: Batch):
    corruption = Absorbing(Linear()).corrupt(
        batch, torch.full((len(batch),), 0.5), VOCABULARY, generator=rng()
    )
    weights = ContextAdaptive(p)(batch, corruption)
    rows, length = batch.ids.shape
    expected = torch.zeros(rows, length)
    for b in range(rows):
        for n in range(length):
            for i in range(length):
                near = batch.document[b, i] == batch.document[b, n] != -1
                if i != n and near and not corruption.is_noised[b, i]:
                    expected[b, n] += 0.5 * p * (1 - p) ** (abs(n - i) - 1)
    here = corruption.is_noised
    assert here.any()
    torch.testing.assert_close(weights[here], expected[here])


def test_it_takes_the_place_of_the_weight():
    batch, model = packed(), TinyDenoiser()
    process = Absorbing(Linear())
    plain, cart = (
        Objective(process=process, text=ModalityLoss(WeightedCrossEntropy(), weighting=weighting))
        for weighting in (Bound(), ContextAdaptive(0.3))
    )
    corruption = plain.corrupt(batch, VOCABULARY, generator=rng())
    weights = ContextAdaptive(0.3)(batch, corruption)
    reweighted = replace(corruption, weight=weights)
    expected = plain.terms(model, batch, reweighted).sums["text"]
    actual = cart.terms(model, batch, corruption).sums["text"]
    torch.testing.assert_close(actual, expected)
    assert not torch.isclose(actual, plain.terms(model, batch, corruption).sums["text"])


def test_complementary_copies_have_their_own_neighbors():
    batch, model = packed(), TinyDenoiser()
    objective = Objective(
        process=Absorbing(Linear()),
        text=ModalityLoss(weighting=ContextAdaptive()),
        image=ModalityLoss(CrossEntropy()),
        complementary=True,
    )
    assert torch.isfinite(objective(model, batch, generator=rng()).sums["text"])


def test_what_it_cannot_weigh_is_named():
    with pytest.raises(ValueError, match=r"p must lie in \(0, 1\], got 0"):
        ContextAdaptive(0.0)
    with pytest.raises(ValueError, match="Uniform does not tell from noise"):
        Objective(process=Uniform(Linear()), text=ModalityLoss(weighting=ContextAdaptive()))
