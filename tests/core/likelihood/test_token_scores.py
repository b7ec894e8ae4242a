"""Scores of tokens: over what can be drawn, and in the memory of one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.coupled import Coupled
from mmdlm.core.likelihood.elbo import Elbo
from mmdlm.core.likelihood.mean_field import OneStepMeanField
from mmdlm.core.likelihood.token_scores import token_scores
from mmdlm.core.likelihood.trajectory import TrajectoryReplay
from mmdlm.core.sampling.order import Random
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import Batch, Sequence, collate, text_segment
from mmdlm.core.vocabulary import Vocabulary
from tests.core.fakes import VOCABULARY, TinyDenoiser, copies, document, ragged, rng

PUBLISHED = Vocabulary(size=9, text=(0, 9), image=(9, 9), mask_id=7, pad_id=8, eos_id=0)


class WithHead(TinyDenoiser):
    """One whose head is a matrix, so that logits need not exist."""

    def head_weight(self) -> Tensor:  # type: ignore[override]
        return self.head.T


# ---- what can be drawn --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TinyDenoiser, WithHead])
def test_log_probabilities_are_of_what_the_sampler_draws_from(kind: type[TinyDenoiser]) -> None:
    """Those of a replay are those at which tokens were committed; suppressed ids have none."""
    denoiser = kind(PUBLISHED)
    sampler = Sampler(steps=4, temperature=1.0, order=Random(), suppress_tokens=(2, 5))
    sequence = Sequence((text_segment([1, 4]), text_segment([0] * 6, target=True)))
    batch = collate([sequence] * 50, PUBLISHED)
    out = sampler(denoiser, batch, generator=rng())
    undrawable = sampler.undrawable(PUBLISHED)
    assert undrawable == (2, 5, 7)
    assert not torch.isin(out.ids[batch.target], torch.tensor(undrawable)).any()
    estimator = TrajectoryReplay()
    filled = collate(
        [Sequence((text_segment([1, 4]), text_segment(row[2:], target=True))) for row in out.ids],
        PUBLISHED,
    )
    (views,) = estimator.draw(filled, PUBLISHED, generator=rng(), steps=out.steps)
    scores = estimator.scores(denoiser, filled, views, undrawable=undrawable, entropy=True)
    torch.testing.assert_close(scores.total, out.log_prob)
    assert (scores.total > estimator.scores(denoiser, filled, views).total)[batch.target].all()
    scores.total.sum().backward()
    assert (denoiser.head.grad[:, list(undrawable)] == 0).all()
    assert (denoiser.head.grad[:, [0, 1, 3, 4, 6, 8]] != 0).all()


@torch.no_grad()
def test_probabilities_of_what_can_be_drawn_add_up_to_1() -> None:
    denoiser, without = WithHead(PUBLISHED), (2, 7, 40)
    total, entropy = torch.zeros(6), torch.zeros(6)
    mask = torch.full((1, 6), PUBLISHED.mask_id)
    for token in set(range(9)) - set(without):
        batch = collate([Sequence((text_segment([token] * 6, target=True),))], PUBLISHED)
        log_prob, spread = token_scores(
            denoiser, mask, batch, where=batch.target, entropy=True, without=without
        )
        total += log_prob[0].exp()
        entropy -= log_prob[0].exp() * log_prob[0]
    assert spread is not None
    torch.testing.assert_close(total, torch.ones(6))
    torch.testing.assert_close(entropy, spread[0])


def test_with_and_without_logits_gradients_are_the_same() -> None:
    gradients = []
    for kind in (TinyDenoiser, WithHead):
        denoiser, batch = kind(), ragged()
        estimator = OneStepMeanField(prompt_mask_prob=0.3)
        (views,) = estimator.draw(batch, VOCABULARY, generator=rng())
        scores = estimator.scores(denoiser, batch, views, undrawable=(1, 3, 17))
        assert torch.isfinite(scores.total[batch.target]).any()
        drawn = ~torch.isin(batch.ids, torch.tensor([1, 3, 17]))
        scores.total[batch.target & drawn].exp().sum().backward()
        gradients.append([p.grad for p in denoiser.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


# ---- memory -------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most of them at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                self.known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.known = {k: v for k, v in self.known.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.known.values()))
        return out


class Wide(TinyDenoiser):
    """One whose activations are many times as large as its scores."""

    def hidden(self, x_t: Tensor, batch: Batch, **_: Any) -> Tensor:
        hidden = super().hidden(x_t, batch)
        return (hidden[..., None] * torch.linspace(1, 2, 32)).sin().mean(-1)


def peak(estimator: LikelihoodEstimator) -> tuple[int, list[Tensor]]:
    """The most bytes alive while scores are computed and their gradient is taken; the gradient."""
    denoiser, batch = Wide(), copies(document(24, 0, seed=1, prompt=3), 16)
    (views,) = estimator.draw(batch, VOCABULARY, generator=rng())
    with Live() as live:
        scores = estimator.scores(denoiser, batch, views)
        (scores.total.sum(1).exp().sum() + scores.log_prob.square().mean()).backward()
    return live.most, [p.grad for p in denoiser.parameters()]


def test_memory_does_not_grow_with_the_number_of_views() -> None:
    """But for the ids and scores of views; the gradient is what it is with all graphs kept."""
    few, many = (Elbo(repeats=n, strata=2) for n in (1, 16))
    base, _ = peak(few)
    most, gradient = peak(many)
    kept, expected = peak(Elbo(repeats=16, strata=2, kept_passes=32))
    assert most < 1.5 * base, (most, base)
    assert kept > 4 * base, (kept, base)
    for a, b in zip(gradient, expected, strict=True):
        assert torch.equal(a, b)


def test_what_is_computed_again_drops_out_the_same() -> None:
    class Dropping(TinyDenoiser):
        def hidden(self, x_t: Tensor, batch: Batch, **_: Any) -> Tensor:
            return F.dropout(super().hidden(x_t, batch), 0.5)

    gradients, batch = [], ragged()
    for kept in (1, 3):
        denoiser, estimator = Dropping(), Coupled(kept_passes=kept)
        (views,) = estimator.draw(batch, VOCABULARY, generator=rng())
        with torch.random.fork_rng():
            torch.manual_seed(5)
            total = estimator.scores(denoiser, batch, views).total
        total.sum().backward()
        gradients.append([p.grad for p in denoiser.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_passes_are_computed_again_only_for_a_gradient_and_beyond_those_that_are_kept() -> None:
    batch = ragged()
    for kept, again in ((1, 2), (2, 1), (3, 0), (9, 0)):
        denoiser, estimator = TinyDenoiser(), Coupled(kept_passes=kept)
        (views,) = estimator.draw(batch, VOCABULARY, generator=rng())
        scores = estimator.scores(denoiser, batch, views)
        assert denoiser.calls == 3
        scores.total.sum().backward()
        assert denoiser.calls == 3 + again
    with torch.no_grad():
        Coupled().scores(denoiser, batch, views)
    with pytest.raises(ValueError, match="Coupled: kept_passes must be at least 1, got 0"):
        Coupled(kept_passes=0)
