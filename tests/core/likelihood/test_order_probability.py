"""The probability of a rollout, order included, by enumeration of all draws and all rollouts."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmdlm.core.likelihood.trajectory import TrajectoryReplay
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import Confidence, Entropy, LeftToRight, Order, Random
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import Factor, Threshold, UniformTransfer
from mmdlm.core.sequence import Batch, Sequence, collate, text_segment
from mmdlm.core.vocabulary import Vocabulary
from tests.core.fakes import TinyDenoiser, rng

OWN = Vocabulary.build(text_size=3, eos_id=0)
# As published vocabularies are: the mask token lies in the range of text, and is never drawn.
PUBLISHED = Vocabulary(size=4, text=(0, 4), image=(4, 4), mask_id=3, pad_id=3, eos_id=0)
IDS = 3  # that can be drawn
Rollout = tuple[tuple[int, ...], tuple[int, ...]]  # ids and steps


def denoiser_of(vocabulary: Vocabulary) -> TinyDenoiser:
    return TinyDenoiser(vocabulary, scale=1.0).double()


def blank(n: int, vocabulary: Vocabulary, rows: int = 1) -> Batch:
    return collate([Sequence((text_segment([0] * n, target=True),))] * rows, vocabulary)


def counts(n: int, steps: int) -> list[int]:
    """Tokens that each step commits."""
    return [n // steps + (step < n % steps) for step in range(steps)]


@torch.no_grad()
def distributions(denoiser: TinyDenoiser, state: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """[n, V] p as the order sees it, and q as tokens are drawn, for a state with masks."""
    vocabulary = denoiser.vocabulary
    batch = blank(len(state), vocabulary)
    everywhere = torch.ones_like(batch.target)
    hidden = denoiser.hidden(torch.tensor([state]), batch)
    logits = denoiser.logits_at(hidden, everywhere, ids=vocabulary.text)
    return logits.softmax(-1), logits[:, :IDS].softmax(-1)


def enumerated(
    denoiser: TinyDenoiser, n: int, steps: int, block: int, *, threshold: float = 2.0
) -> dict[Rollout, float]:
    """All rollouts of `Confidence` and their probabilities, over everything that can be drawn."""
    mask, total = denoiser.vocabulary.mask_id, defaultdict(float)

    def go(state: tuple[int, ...], when: tuple[int, ...], step: int, chance: float) -> None:
        if mask not in state:
            total[state, when] += chance
            return
        p, q = distributions(denoiser, state)
        first = state.index(mask) // block
        here = [i for i in range(n) if state[i] == mask and i // block == first]
        per_block = steps // ((n + block - 1) // block)
        size = min(block, n - first * block)
        done = sum(when[i] >= step - step % per_block and i // block == first for i in range(n))
        left = size - sum(counts(size, per_block)[: step % per_block + 1])
        count = max(1, size - done - left)
        for drawn in itertools.product(range(IDS), repeat=len(here)):
            ranked = sorted(zip(here, drawn, strict=True), key=lambda one: (-p[one], one[0]))
            probability = chance
            for one in zip(here, drawn, strict=True):
                probability *= float(q[one])
            new, at = list(state), list(when)
            for number, (place, token) in enumerate(ranked):
                if number < count or float(p[place, token]) >= threshold:
                    new[place], at[place] = token, step
            go(tuple(new), tuple(at), step + 1, probability)

    go((mask,) * n, (-1,) * n, 0, 1.0)
    return dict(total)


def log_likelihoods(
    estimator: TrajectoryReplay, denoiser: TinyDenoiser, rollouts: list[Rollout], sampler: Sampler
) -> Tensor:
    """[N] of each rollout, differentiable."""
    vocabulary = denoiser.vocabulary
    batch = blank(len(rollouts[0][0]), vocabulary, len(rollouts))
    batch = replace(batch, ids=torch.tensor([ids for ids, _ in rollouts]))
    steps = torch.tensor([when for _, when in rollouts])
    (views,) = estimator.draw(batch, vocabulary, generator=rng(), steps=steps)
    undrawable = sampler.undrawable(vocabulary)
    scores = estimator.scores(denoiser, batch, views, undrawable=undrawable)
    return scores.total.sum(1)


@pytest.mark.parametrize("vocabulary", [OWN, PUBLISHED], ids=["own", "published"])
@pytest.mark.parametrize(
    ("n", "steps", "block"), [(3, 3, 3), (3, 2, 3), (4, 2, 4), (4, 4, 2)], ids=str
)
def test_with_order_it_is_the_probability_of_each_rollout(
    n: int, steps: int, block: int, vocabulary: Vocabulary
) -> None:
    """One token a step, several, and blocks; together all rollouts have probability 1."""
    denoiser = denoiser_of(vocabulary)
    exact = enumerated(denoiser, n, steps, block)
    sampler = Sampler(steps=steps, temperature=1.0, block_length=block)
    estimator = TrajectoryReplay(with_order=True, block_length=block)
    estimator.check(sampler)
    rollouts = list(exact)
    found = log_likelihoods(estimator, denoiser, rollouts, sampler).detach().exp()
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-4)
    expected = torch.tensor(list(exact.values()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    if n == 3 and steps == 3:  # without, they are no probabilities of these rollouts
        plain = log_likelihoods(TrajectoryReplay(), denoiser, rollouts, sampler).detach().exp()
        assert float((plain / plain.sum() - expected).abs().sum() / 2) > 0.1


@pytest.mark.parametrize("threshold", [0.4, 0.6])
def test_with_a_threshold_it_is_the_probability_of_each_rollout(threshold: float) -> None:
    denoiser = denoiser_of(PUBLISHED)
    exact = enumerated(denoiser, 3, 3, 3, threshold=threshold)
    sampler = Sampler(steps=3, temperature=1.0, unmasking=Threshold(threshold))
    estimator = TrajectoryReplay(with_order=True, threshold=threshold)
    estimator.check(sampler)
    rollouts = list(exact)
    found = log_likelihoods(estimator, denoiser, rollouts, sampler).detach().exp()
    torch.testing.assert_close(found, torch.tensor(list(exact.values())), rtol=1e-4, atol=1e-6)
    assert any(max(when) < 2 for _, when in rollouts)  # several at once
    assert any(max(when) == 2 for _, when in rollouts)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_the_enumeration_is_what_the_sampler_does(threshold: float | None) -> None:
    """Frequencies of 40,000 rollouts."""
    denoiser = denoiser_of(PUBLISHED)
    exact = enumerated(denoiser, 3, 2, 3, threshold=threshold or 2.0)
    batch = blank(3, PUBLISHED, 40_000)
    unmasking = UniformTransfer() if threshold is None else Threshold(threshold)
    out = Sampler(steps=2, temperature=1.0, unmasking=unmasking)(denoiser, batch, generator=rng())
    seen: dict[Rollout, float] = defaultdict(float)
    for ids, when in zip(out.ids.tolist(), out.steps.tolist(), strict=True):
        seen[tuple(ids), tuple(when)] += 1 / len(batch)
    assert set(seen) <= set(exact)
    distance = sum(abs(seen[one] - exact[one]) for one in exact) / 2
    assert distance < 0.02, distance


def test_its_gradient_is_that_of_the_expected_reward() -> None:
    """Against differences of the enumerated expectation; that without the order is another."""
    denoiser = denoiser_of(OWN)
    exact = enumerated(denoiser, 3, 3, 3)
    rollouts = list(exact)
    reward = torch.tensor([float(ids[0] == ids[1]) - ids[2] for ids, _ in rollouts])
    sampler = Sampler(steps=3, temperature=1.0)
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(denoiser.head.shape, generator=generator, dtype=torch.float64)

    def expected() -> float:
        law = enumerated(denoiser, 3, 3, 3)
        return sum(law[one] * float(r) for one, r in zip(rollouts, reward, strict=True))

    slopes = []
    for estimator in (TrajectoryReplay(with_order=True), TrajectoryReplay()):
        denoiser.zero_grad()
        log_p = log_likelihoods(estimator, denoiser, rollouts, sampler)
        chance = torch.tensor(list(exact.values()))
        (chance * reward * log_p).sum().backward()  # E[R grad log p]
        slopes.append(float((denoiser.head.grad * direction).sum()))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            denoiser.head.add_(sign * 1e-4 * direction)
        values.append(expected())
        with torch.no_grad():
            denoiser.head.sub_(sign * 1e-4 * direction)
    true = (values[0] - values[1]) / 2e-4
    assert slopes[0] == pytest.approx(true, rel=1e-3)
    assert abs(slopes[1] - true) > 0.02 * abs(true)


@pytest.mark.slow
@pytest.mark.parametrize("order", [LeftToRight(), Random(), Entropy()], ids=str)
@torch.no_grad()
def test_a_plain_trace_is_exact_for_orders_that_do_not_look_at_the_draw(order: Order) -> None:
    """Times what the order itself gives: all rollouts that there are have probability 1."""
    denoiser = denoiser_of(OWN)
    sampler = Sampler(steps=3, temperature=1.0, order=order)
    out = sampler(denoiser, blank(3, OWN, 20_000), generator=rng())
    rollouts = sorted(
        {(tuple(i), tuple(w)) for i, w in zip(out.ids.tolist(), out.steps.tolist(), strict=True)}
    )
    of_order = 1 / 6 if isinstance(order, Random) else 1.0
    total = of_order * log_likelihoods(TrajectoryReplay(), denoiser, rollouts, sampler).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=0.01)  # but for rollouts that never came


def test_what_it_would_not_be_exact_for_is_refused() -> None:
    estimator = TrajectoryReplay(with_order=True, block_length=4)
    exact = Sampler(steps=4, temperature=1.0, block_length=4)
    estimator.check(exact)
    TrajectoryReplay().check(replace(exact, order=Random(), temperature=0.7))
    for change, message in (
        ({"order": Entropy()}, "knows only the probability of Confidence"),
        ({"order": Confidence(1.0)}, "knows only the probability of Confidence"),
        ({"temperature": 0.8}, "exact only with temperature 1.0, but the sampler has 0.8"),
        ({"top_p": 0.9}, "exact only with top_p None, but the sampler has 0.9"),
        ({"guidance": ClassifierFreeGuidance(2.0)}, "guidance"),
        ({"block_length": 8}, "exact only with block_length 4, but the sampler has 8"),
        ({"unmasking": Threshold(0.9)}, "told of threshold None, but that of the sampler is 0.9"),
        ({"unmasking": Threshold(0.9, in_order=True)}, "does not depend on the draw"),
        ({"unmasking": Factor(0.9)}, "does not depend on the draw"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator.check(replace(exact, **change))
    with pytest.raises(ValueError, match="set shrink to 1, not 2"):
        TrajectoryReplay(with_order=True, shrink=2)
    with pytest.raises(ValueError, match="block_length 3 is read only with with_order"):
        TrajectoryReplay(block_length=3)
