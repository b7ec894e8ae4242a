"""VRPO's loss and its gradient against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

from mmdlm.core.likelihood.elbo import Elbo
from mmdlm.core.likelihood.mean_field import OneStepMeanField
from mmdlm.core.sequence import collate
from mmdlm.rl.preference import Answers, Vrpo
from tests.core.fakes import VOCABULARY, TinyDenoiser, document, rng


def answers(seed: int, n: int = 5) -> Answers:
    generator = rng(seed)

    def draw() -> torch.Tensor:
        return -3 * torch.rand(n, generator=generator, dtype=torch.float64)

    tokens = torch.randint(1, 9, (n,), generator=generator)
    return Answers(policy=draw().requires_grad_(), reference=draw(), tokens=tokens)


def plain(chosen: Answers, rejected: Answers, beta: float, sft: float) -> float:
    total, won = 0.0, chosen.policy.detach()
    for i in range(len(chosen.policy)):
        margin = float(won[i] - chosen.reference[i])
        margin -= float(rejected.policy.detach()[i] - rejected.reference[i])
        total += math.log(1 + math.exp(-beta * margin))
        total -= sft * float(won[i]) / int(chosen.tokens[i])
    return total / len(chosen.policy)


def loss_of(loss: Vrpo, chosen: Answers, rejected: Answers) -> torch.Tensor:
    terms = loss(chosen, rejected)
    return sum(
        weight * terms.sums[name] / terms.counts[name] for name, weight in loss.coefficients.items()
    )


@pytest.mark.parametrize(("beta", "sft"), [(0.2, 0.05), (1.5, 0.0)])
def test_is_the_formula(beta: float, sft: float):
    chosen, rejected, loss = answers(1), answers(2), Vrpo(beta=beta, sft=sft)
    got = loss_of(loss, chosen, rejected)
    assert float(got.detach()) == pytest.approx(plain(chosen, rejected, beta, sft), rel=1e-12)


def test_gradient_is_that_of_finite_differences():
    chosen, rejected, loss = answers(1), answers(2), Vrpo()

    def value(won: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
        return loss_of(
            loss,
            Answers(won, chosen.reference, chosen.tokens),
            Answers(lost, rejected.reference, rejected.tokens),
        )

    assert torch.autograd.gradcheck(value, (chosen.policy, rejected.policy))


def test_statistics():
    chosen, rejected = answers(1), answers(2)
    logged = Vrpo(beta=0.5)(chosen, rejected).statistics.values()
    won = 0.5 * (chosen.policy - chosen.reference).detach()
    lost = 0.5 * (rejected.policy - rejected.reference).detach()
    assert logged["rewards/chosen"] == pytest.approx(float(won.mean()))
    assert logged["rewards/margins"] == pytest.approx(float((won - lost).mean()))
    assert logged["rewards/accuracies"] == pytest.approx(float((won > lost).double().mean()))
    assert logged["logps/rejected"] == pytest.approx(float(rejected.policy.detach().mean()))


@pytest.mark.parametrize("kind", ["text", "image"])
def test_learns_to_prefer(kind: str):
    """Text and images alike: the chosen answers become likelier than the rejected."""
    sizes = (5, 0) if kind == "text" else (0, 5)
    chosen, rejected = (
        collate([document(*sizes, seed=s, prompt=2) for s in seeds], VOCABULARY)
        for seeds in (range(4), range(10, 14))
    )
    policy, reference = TinyDenoiser(), TinyDenoiser()
    estimator, loss, generator = Elbo(repeats=4, strata=1), Vrpo(), rng()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)

    def scored(batch) -> Answers:
        (views,) = estimator.draw(batch, VOCABULARY, generator=generator)
        with torch.no_grad():
            fixed = estimator.log_prob(reference, batch, views).sum(1)
        return Answers(estimator.log_prob(policy, batch, views).sum(1), fixed, batch.target.sum(1))

    first = loss_of(loss, scored(chosen), scored(rejected))
    at_start = loss(scored(chosen), scored(rejected)).sums["preference"]
    assert float(at_start.detach()) == pytest.approx(
        4 * math.log(2), abs=1e-5
    )  # the policy is the reference, on the same views exactly so
    for _ in range(25):
        optimizer.zero_grad()
        loss_of(loss, scored(chosen), scored(rejected)).backward()
        optimizer.step()
    with torch.no_grad():
        terms = loss(scored(chosen), scored(rejected))
        assert terms.statistics.values()["rewards/accuracies"] == 1.0
        assert float(loss_of(loss, scored(chosen), scored(rejected))) < float(first)
        exact = OneStepMeanField(prompt_mask_prob=0)
        gained = [
            (exact(policy, b, generator=rng()) - exact(reference, b, generator=rng())).sum()
            for b in (chosen, rejected)
        ]
        assert gained[0] > gained[1]


def test_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="beta must be above 0, got 0"):
        Vrpo(beta=0)
    with pytest.raises(ValueError, match="sft must not be negative"):
        Vrpo(sft=-1)
