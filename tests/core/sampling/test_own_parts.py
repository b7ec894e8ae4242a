"""Parts that users write themselves: what they may return, and what is refused."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

import pytest
import torch

from mmdlm.core.diffusion.schedule import Linear
from mmdlm.core.likelihood import base as likelihood
from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.noisy_view import NoisyView, masked_view, scored_targets
from mmdlm.core.likelihood.token_scores import token_log_prob
from mmdlm.core.sampling.order import Candidates, Order
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import Progress, UniformTransfer, UnmaskingRule, highest
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.experimental.neighbor_noise import Neighborhood, TokenNeighbor
from tests.core.fakes import VOCABULARY, TinyDenoiser, ragged, rng


@dataclass(frozen=True)
class RightToLeft(Order):
    """Scores of a dtype that a user may well return."""

    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (-1,)

    def score(self, candidates: Candidates, *, generator: torch.Generator) -> torch.Tensor:
        return candidates.column.to(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Halves(UnmaskingRule):
    """Leaves half of what is open, as a number with a fraction, and chooses context as well."""

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> torch.Tensor:
        return progress.open / 2

    def choose(self, score, probability, *, words, among, count, progress) -> torch.Tensor:
        return highest(score, among, count) | ~among


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_scores_of_an_order_may_have_any_dtype(dtype: torch.dtype):
    out = Sampler(steps=30, order=RightToLeft(dtype))(TinyDenoiser(), ragged(), generator=rng())
    for steps, target in zip(out.steps, ragged().target, strict=True):
        assert (steps[target].diff() < 0).all()


@dataclass(frozen=True)
class OneForAll(UnmaskingRule):
    """One number where each row is to have its own."""

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> torch.Tensor:
        return progress.open.max()


@dataclass(frozen=True)
class OneRow(UniformTransfer):
    """A choice for the first row alone, as whole numbers."""

    rows: int = 1

    def choose(self, score, probability, *, words, among, count, progress) -> torch.Tensor:
        return highest(score, among, count)[: self.rows].long()


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {"order": RightToLeft(shape=(-1, 1))},
            r"RightToLeft.score gave a tensor of shape \(\d+, 1\)",
        ),
        (
            {"unmasking": OneForAll()},
            r"OneForAll.remaining gave .* shape \(\), but \(5,\) was asked",
        ),
        (
            {"unmasking": OneRow()},
            r"OneRow.choose gave a tensor of shape \(1, \d+\), but \(5, \d+\)",
        ),
    ],
)
def test_tensors_of_another_shape_are_refused(parts, said: str):
    with pytest.raises(ValueError, match=said):
        Sampler(steps=3, **parts)(TinyDenoiser(), ragged(), generator=rng())


def test_a_choice_may_be_of_whole_numbers():
    usual, own = (
        Sampler(steps=5, unmasking=rule)(TinyDenoiser(), ragged(), generator=rng())
        for rule in (UniformTransfer(), OneRow(rows=9))
    )
    assert torch.equal(usual.ids, own.ids)


def test_a_commit_rule_of_ones_own_changes_no_context():
    batch = ragged()
    out = Sampler(steps=5, unmasking=Halves())(TinyDenoiser(), batch, generator=rng())
    assert torch.equal(out.ids[~batch.target], batch.ids[~batch.target])
    assert (out.steps[~batch.target] == -1).all()
    assert (out.steps[batch.target] >= 0).all()


@dataclass(frozen=True)
class LastHalf(LikelihoodEstimator):
    """Each answer's second half, given the first: the example of the estimators' module."""

    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: torch.Tensor | None = None,
        steps: torch.Tensor | None = None,
    ) -> tuple[tuple[NoisyView, ...], ...]:
        scored = scored_targets(batch, scored)
        place = scored.cumsum(1)
        masked = scored & (2 * place > scored.sum(1, keepdim=True))
        weight = torch.ones(scored.shape, device=scored.device)
        view = masked_view(batch, vocabulary, masked, scored, weight=weight)
        return ((view,),) * iterations


def test_an_estimator_of_ones_own_needs_nothing_private():
    batch, denoiser = ragged(), TinyDenoiser()
    log_prob = LastHalf()(denoiser, batch, generator=rng())
    targets = batch.target.sum(1)
    assert torch.equal((log_prob != 0).sum(1), (targets + 1) // 2)
    last = torch.zeros_like(batch.target)
    last[1, batch.target[1].nonzero()[-5:]] = True
    x_t = batch.ids.masked_fill(last, VOCABULARY.mask_id)
    exact = token_log_prob(denoiser, x_t[1:2], batch.rows(torch.tensor([1])), where=last[1:2])
    torch.testing.assert_close(log_prob[1:2], exact)
    example = inspect.getsource(LastHalf.draw).split("-> tuple")[1].splitlines()[1:]
    said = likelihood.__doc__ or ""
    assert all(line.strip() in said for line in example)
    names = {name for line in example for name in re.findall(r"\b[a-z_]+(?=\()", line)}
    assert not any(name.startswith("_") for name in names)


@dataclass(frozen=True)
class Upwards(Neighborhood):
    """The next code, of a dtype that a user may well return."""

    dtype: torch.dtype = torch.float32

    def step(self, codes: torch.Tensor, size: int, *, generator: torch.Generator) -> torch.Tensor:
        return ((codes + 1) % size).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_a_neighborhood_of_ones_own_may_give_any_dtype(dtype: torch.dtype):
    usual, own = (
        TokenNeighbor(Linear(), neighborhood=Upwards(kind)).corrupt(
            ragged(), torch.full((5,), 0.7), VOCABULARY, generator=rng()
        )
        for kind in (torch.int64, dtype)
    )
    assert torch.equal(usual.x_t, own.x_t)
    assert not torch.equal(own.x_t, ragged().ids)
