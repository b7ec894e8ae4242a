"""Parts that users write themselves: what they may return, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from mmdlm.core.commit import CommitRule, Progress, highest
from mmdlm.core.order import Candidates, Order
from mmdlm.core.sampler import Sampler
from tests.core.fakes import TinyDenoiser, ragged, rng


@dataclass(frozen=True)
class RightToLeft(Order):
    """Scores of a dtype that a user may well return."""

    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (-1,)

    def score(self, candidates: Candidates, *, generator: torch.Generator) -> torch.Tensor:
        return candidates.column.to(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Halves(CommitRule):
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


def test_scores_of_another_shape_are_refused():
    order = RightToLeft(shape=(-1, 1))
    with pytest.raises(ValueError, match=r"RightToLeft.score gave a tensor of shape \(\d+, 1\)"):
        Sampler(steps=3, order=order)(TinyDenoiser(), ragged(), generator=rng())


def test_a_commit_rule_of_ones_own_changes_no_context():
    batch = ragged()
    out = Sampler(steps=5, commit=Halves())(TinyDenoiser(), batch, generator=rng())
    assert torch.equal(out.ids[~batch.target], batch.ids[~batch.target])
    assert (out.steps[~batch.target] == -1).all()
    assert (out.steps[batch.target] >= 0).all()
