"""Policy losses against plain loops and finite differences, and a policy that learns by each."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.coupled import Coupled
from mmdlm.core.likelihood.elbo import Elbo
from mmdlm.core.likelihood.mean_field import OneStepMeanField
from mmdlm.core.likelihood.noisy_view import NoisyView
from mmdlm.core.likelihood.structured import StructuredNoise
from mmdlm.core.likelihood.token_scores import TokenScores
from mmdlm.core.likelihood.trajectory import TrajectoryReplay
from mmdlm.core.sampling.order import Random
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import collate
from mmdlm.experimental.block_random import BlockRandom
from mmdlm.experimental.spg import Spg
from mmdlm.rl.advantage import MeanBaseline, Standardized
from mmdlm.rl.policy_loss import ClippedSurrogate, PolicyLoss, PolicyTerms, Wd1
from mmdlm.rl.rollout import Rollout
from tests.core.fakes import VOCABULARY, TinyDenoiser, document, ragged, rng

ESTIMATORS: list[LikelihoodEstimator] = [
    OneStepMeanField(),
    StructuredNoise(),
    Coupled(),
    TrajectoryReplay(shrink=2),
    Elbo(repeats=3, strata=1),
    BlockRandom(block_length=4),
]
LOSSES: list[PolicyLoss] = [
    ClippedSurrogate(),
    ClippedSurrogate(epsilon=0.5, beta=0.04, loss_normalization="token"),
    ClippedSurrogate(level="sequence", loss_normalization="sequence", epsilon_high=0.3),
    ClippedSurrogate(level="product", loss_normalization="constant", length=7, beta=0.1, kl="k1"),
    ClippedSurrogate(loss_normalization="sequence", beta=0.01, anchor="old"),
    ClippedSurrogate(
        loss_normalization="sequence", beta=0.01, anchor="old", kl_normalization="view"
    ),
    Wd1(psi=2.0),
    Spg(),
    Spg(mix=1.0, eubo_beta=2.0),
]
every_estimator = pytest.mark.parametrize(
    "estimator", ESTIMATORS, ids=lambda estimator: type(estimator).__name__
)
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=range(len(LOSSES)))

B, K, L = 4, 3, 6


def loss_of(loss: PolicyLoss, terms: PolicyTerms) -> Tensor:
    return sum(
        weight * terms.sums[name] / terms.counts[name] for name, weight in loss.coefficients.items()
    )


def made_up(seed: int = 0, *, near: TokenScores | None = None) -> TokenScores:
    """Scores in float64; some tokens are covered by no view, one row by none at all."""
    generator = rng(seed)
    covered = torch.rand((K, B, L), generator=generator) < 0.5
    covered[:, 2] = False
    weight = torch.rand((K, B, L), generator=generator, dtype=torch.float64) + 0.2
    log_prob = -2 * torch.rand((K, B, L), generator=generator, dtype=torch.float64)
    if near is not None:
        covered, weight, log_prob = near.covered, near.weight, near.log_prob + 0.2 * log_prob + 0.2
    zero = torch.zeros((), dtype=torch.float64)
    return TokenScores(
        log_prob=torch.where(covered, log_prob, zero),
        covered=covered,
        weight=torch.where(covered, weight, zero),
    )


def views_of(scores: TokenScores) -> list[NoisyView]:
    return [
        NoisyView(x_t=torch.zeros(c.shape), covered=c, weight=w)
        for c, w in zip(scores.covered, scores.weight, strict=True)
    ]


ADVANTAGE = torch.tensor([0.7, -1.1, 2.0, -0.3], dtype=torch.float64)


def test_an_answer_without_a_reward_is_in_no_group_of_wd1() -> None:
    group = torch.zeros(4, dtype=torch.int64)
    advantage = torch.tensor([1.0, 0.0, -1.0, 0.0])
    known = torch.tensor([True, False, True, False])
    alone = Wd1().prepare(advantage[known], group=group[known])
    assert torch.equal(Wd1().prepare(advantage, group=group, known=known)[known], alone)
    assert not Wd1().prepare(advantage, group=group, known=known)[~known].any()


def test_a_policy_far_from_its_anchor_has_a_finite_divergence() -> None:
    old = made_up(1)
    policy = TokenScores(old.log_prob - 1e4, old.covered, old.weight)
    loss = ClippedSurrogate(beta=0.1)
    value = loss_of(loss, loss(policy, ADVANTAGE, old=policy, reference=old))
    assert bool(torch.isfinite(value))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epsilon_high": -0.5}, "epsilon_high must not be negative, got -0.5"),
        ({"loss_normalization": "constant", "length": -3}, "length must be at least 1, got -3"),
        ({"loss_normalization": "batch"}, "'batch' is not one of token, sequence, constant"),
        ({"kl_normalization": "row"}, "kl_normalization 'row' is not one of policy, view"),
    ],
)
def test_a_surrogate_of_impossible_numbers_is_refused(options, said) -> None:
    with pytest.raises(ValueError, match=said):
        ClippedSurrogate(**options)


# ---- the clipped surrogate ----------------------------------------------------------------------


def plain_surrogate(
    loss: ClippedSurrogate, policy: TokenScores, old: TokenScores, reference: TokenScores
) -> float:
    """By loops over rows and tokens."""

    def total(scores: TokenScores, b: int, i: int) -> float:
        return sum(float(scores.weight[k, b, i] * scores.log_prob[k, b, i]) for k in range(K))

    high = loss.epsilon if loss.epsilon_high is None else loss.epsilon_high
    rows, tokens = [], 0
    in_views = []  # the KL of each view of a row that covers anything
    anchor = reference if loss.anchor == "reference" else old
    for b in range(B):
        places = [i for i in range(L) if any(policy.covered[k, b, i] for k in range(K))]
        tokens += len(places)
        difference = {i: total(policy, b, i) - total(old, b, i) for i in places}
        weights = sum(float(policy.weight[k, b, i]) for k in range(K) for i in places)
        values = []
        for i in places:
            exponent = difference[i]
            if loss.level != "token":
                exponent = sum(difference.values())
            if loss.level == "sequence":
                exponent /= weights
            ratio, a = math.exp(exponent), float(ADVANTAGE[b])
            value = -min(ratio * a, min(max(ratio, 1 - loss.epsilon), 1 + high) * a)
            weighted, weight = 0.0, 0.0
            for k in range(K):  # each view by itself
                d = float(anchor.log_prob[k, b, i] - policy.log_prob[k, b, i])
                w = float(policy.weight[k, b, i])
                weighted += w * (math.exp(d) - d - 1 if loss.kl == "k3" else -d)
                weight += w
            if loss.kl_normalization == "policy":
                value += loss.beta * weighted / weight
            values.append(value)
        if places:
            rows.append(values)
        for k in range(K):
            d = [
                float(anchor.log_prob[k, b, i] - policy.log_prob[k, b, i])
                for i in places
                if policy.covered[k, b, i]
            ]
            if d:
                in_views.append(sum(math.exp(x) - x - 1 if loss.kl == "k3" else -x for x in d))
    kl = loss.beta * sum(in_views) / len(in_views) if loss.kl_normalization == "view" else 0.0
    if loss.loss_normalization == "token":
        return sum(map(sum, rows)) / tokens + kl
    if loss.loss_normalization == "sequence":
        return sum(sum(row) / len(row) for row in rows) / len(rows) + kl
    assert loss.length is not None
    assert len(rows) == B - 1  # one has nothing to learn from
    return sum(map(sum, rows)) / (len(rows) * loss.length) + kl


@pytest.mark.parametrize("level", ["token", "sequence", "product"])
@pytest.mark.parametrize("loss_normalization", ["token", "sequence", "constant"])
@pytest.mark.parametrize(
    ("kl", "anchor"), [("k1", "reference"), ("k3", "reference"), ("k3", "old")]
)
@pytest.mark.parametrize("kl_normalization", ["policy", "view"])
def test_surrogate_is_the_formula(level, loss_normalization, kl, anchor, kl_normalization):
    old = made_up(1)
    policy, reference = made_up(2, near=old), made_up(3, near=old)
    loss = ClippedSurrogate(
        epsilon=0.1,
        epsilon_high=0.25,
        level=level,
        loss_normalization=loss_normalization,
        length=9 if loss_normalization == "constant" else None,
        beta=0.3,
        kl=kl,
        anchor=anchor,
        kl_normalization=kl_normalization,
    )
    terms = loss(policy, ADVANTAGE, old=old, reference=reference)
    assert loss.counts(views_of(policy)) == terms.counts
    expected = plain_surrogate(loss, policy, old, reference)
    assert float(loss_of(loss, terms)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss_normalization", ["token", "sequence", "constant"])
def test_a_row_that_stands_in_for_a_dropped_batch_counts_nothing(loss_normalization) -> None:
    """A batch of which nothing is learned keeps one row, so that all processes keep step."""
    length = 9 if loss_normalization == "constant" else None
    loss = ClippedSurrogate(
        loss_normalization=loss_normalization, length=length, beta=0.1, anchor="old"
    )
    policy = made_up(1)
    row = TokenScores(policy.log_prob[:, 2:3], policy.covered[:, 2:3], policy.weight[:, 2:3])
    assert not row.covered.any()
    terms = loss(row, ADVANTAGE[2:3])
    assert {name: int(n) for name, n in loss.counts(views_of(row)).items()} == {
        "policy": 0,
        "kl": 0,
    }
    assert {name: int(n) for name, n in terms.counts.items()} == {"policy": 0, "kl": 0}
    assert not any(terms.sums.values())


@pytest.mark.parametrize("level", ["token", "sequence", "product"])
@pytest.mark.parametrize("kl", ["k1", "k3"])
def test_surrogate_gradient_is_that_of_finite_differences(level, kl):
    old = made_up(1)
    policy, reference = made_up(2, near=old), made_up(3, near=old)
    loss = ClippedSurrogate(level=level, beta=0.3, kl=kl, epsilon=0.1)

    def value(log_prob: Tensor) -> Tensor:
        scores = replace(policy, log_prob=torch.where(policy.covered, log_prob, 0.0))
        return loss_of(loss, loss(scores, ADVANTAGE, old=old, reference=reference))

    start = policy.log_prob.clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (start,))
    (gradient,) = torch.autograd.grad(value(start), start)
    assert (gradient[~policy.covered] == 0).all()
    assert (gradient != 0).any()


def test_without_an_old_policy_the_gradient_is_that_of_the_likelihood():
    policy = made_up(1)
    policy = replace(policy, log_prob=policy.log_prob.requires_grad_())
    terms = ClippedSurrogate()(policy, ADVANTAGE)
    (gradient,) = torch.autograd.grad(terms.sums["policy"], policy.log_prob)
    torch.testing.assert_close(gradient, -ADVANTAGE[None, :, None] * policy.weight)


def test_clipping_stops_the_gradient_where_the_ratio_has_gone_far_enough():
    old = made_up(1)
    shift = torch.where(old.covered, 1.0, 0.0)
    for sign, still in ((1.0, ADVANTAGE < 0), (-1.0, ADVANTAGE > 0)):
        policy = replace(old, log_prob=(old.log_prob + sign * shift).requires_grad_())
        terms = ClippedSurrogate()(policy, ADVANTAGE, old=old)
        (gradient,) = torch.autograd.grad(terms.sums["policy"], policy.log_prob)
        moved = (gradient != 0).any(2).any(0)
        assert moved.tolist() == (still & old.anywhere.any(1)).tolist()


def test_a_ratio_beyond_all_numbers_leaves_gradients_finite():
    old = made_up(1)
    shift = torch.where(old.covered, 1e4, 0.0)
    policy = replace(old, log_prob=(old.log_prob + shift).float().requires_grad_())
    advantage = torch.tensor([1.0, 0.0, 0.0, 2.0])
    terms = ClippedSurrogate(level="product")(policy, advantage, old=old)
    (gradient,) = torch.autograd.grad(terms.sums["policy"], policy.log_prob)
    assert torch.isfinite(terms.sums["policy"])
    assert (gradient == 0).all()  # clipped, or without an advantage


def test_clip_statistics_are_those_of_trl():
    old = made_up(1)
    policy, reference = made_up(2, near=old), made_up(3, near=old)
    loss = ClippedSurrogate(epsilon=0.05, epsilon_high=0.1, beta=0.1)
    terms = loss(policy, ADVANTAGE, old=old, reference=reference)
    covered = policy.covered.any(0)
    ratio = (policy.total - old.total).exp()
    low = ((ratio < 0.95) & (ADVANTAGE[:, None] < 0))[covered].double().mean()
    high = ((ratio > 1.1) & (ADVANTAGE[:, None] > 0))[covered].double().mean()
    logged = terms.statistics.values()
    assert float(low) > 0 or float(high) > 0
    assert logged == pytest.approx(
        {
            "clip_ratio/low_mean": float(low),
            "clip_ratio/low_min": float(low),
            "clip_ratio/high_mean": float(high),
            "clip_ratio/high_max": float(high),
            "clip_ratio/region_mean": float(low + high),
            "kl": float(terms.sums["kl"] / terms.counts["kl"]),
        }
    )


def test_k3_is_never_negative_and_zero_where_nothing_has_moved():
    old, loss = made_up(1), ClippedSurrogate(beta=0.1)
    same = loss(old, ADVANTAGE, old=old, reference=old)
    assert float(same.sums["kl"]) == 0
    moved = loss(made_up(2, near=old), ADVANTAGE, old=old, reference=old)
    assert float(moved.sums["kl"]) > 0


# ---- wd1 ----------------------------------------------------------------------------------------


def test_wd1_is_the_formula():
    loss, policy = Wd1(psi=1.7), made_up(1)
    policy = replace(
        policy, covered=policy.covered.index_fill(1, torch.tensor([2]), True)
    )  # every row counts
    group = torch.tensor([5, 3, 5, 5])
    weight = loss.prepare(ADVANTAGE, group=group)
    terms = loss(policy, weight)
    expected = 0.0
    for members in ([0, 2, 3], [1]):
        up = [math.exp(1.7 * float(ADVANTAGE[j])) for j in members]
        down = [math.exp(-1.7 * float(ADVANTAGE[j])) for j in members]
        for j, u, d in zip(members, up, down, strict=True):
            log_prob = float(policy.total[j].sum())
            expected += len(members) * (d / sum(down) - u / sum(up)) * log_prob
    assert float(loss_of(loss, terms)) == pytest.approx(expected / 4, rel=1e-9)


# ---- SPG ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_spg_is_the_formula(mix: float):
    """As published: means over the masked tokens of a view, then over views, weighed by length."""
    beta, loss = 1.5, Spg(eubo_beta=1.5, mix=mix)
    length = [5, 3, 4, 6]  # tokens of each answer, of which a view masks `size`
    generator = rng(1)
    covered = torch.zeros(K, B, L, dtype=torch.bool)
    weight = torch.zeros(K, B, L, dtype=torch.float64)
    for k in range(K):
        for b in range(B):
            size = 1 + (k + b) % length[b]
            covered[k, b, torch.randperm(length[b], generator=generator)[:size]] = True
            weight[k, b, covered[k, b]] = length[b] / size / K
    log_prob = -2 * torch.rand((K, B, L), generator=generator, dtype=torch.float64) * covered
    policy = TokenScores(log_prob=log_prob, covered=covered, weight=weight)

    value = 0.0
    for b in range(B):
        lower = sum(float(log_prob[k, b, covered[k, b]].mean()) for k in range(K)) / K
        per_token = []
        for i in range(L):
            terms = [
                math.exp(beta * float(log_prob[k, b, i])) * length[b] / int(covered[k, b].sum())
                for k in range(K)
                if covered[k, b, i]
            ]
            if terms:
                per_token.append(math.log(sum(terms) / K) / beta)
        upper = sum(per_token) / len(per_token)
        estimate = lower if ADVANTAGE[b] >= 0 else mix * upper + (1 - mix) * lower
        value -= float(ADVANTAGE[b]) * estimate * length[b]
    got = loss_of(loss, loss(policy, ADVANTAGE))
    assert float(got) == pytest.approx(value / sum(length), rel=1e-9)


@pytest.mark.parametrize("loss", [Spg(), Spg(mix=1.0), Wd1()])
def test_gradients_without_ratio_are_those_of_finite_differences(loss: PolicyLoss):
    policy = made_up(1)

    def value(log_prob: Tensor) -> Tensor:
        scores = replace(policy, log_prob=torch.where(policy.covered, log_prob, 0.0))
        return loss_of(loss, loss(scores, ADVANTAGE))

    start = policy.log_prob.clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (start,))
    (gradient,) = torch.autograd.grad(value(start), start)
    assert torch.isfinite(gradient).all()
    assert (gradient[~policy.covered] == 0).all()


def test_the_upper_bound_survives_what_is_all_but_impossible():
    policy = made_up(1)
    policy = replace(policy, log_prob=(1000 * policy.log_prob).float().requires_grad_())
    value = Spg(mix=1.0).upper(policy)
    assert torch.isfinite(value).all()
    (gradient,) = torch.autograd.grad(value.sum(), policy.log_prob)
    assert torch.isfinite(gradient).all()


# ---- what holds for all -------------------------------------------------------------------------


def rolled_out(estimator: LikelihoodEstimator, *, iterations: int = 2):
    batch, denoiser = ragged(), TinyDenoiser()
    rollout = Rollout.sample(
        Sampler(steps=8, order=Random(), temperature=1.0), denoiser, batch, generator=rng()
    )
    plan = estimator.draw(
        rollout.batch,
        VOCABULARY,
        generator=rng(),
        iterations=iterations,
        scored=rollout.scored,
        steps=rollout.steps,
    )
    return denoiser, rollout.batch, plan


@every_estimator
@every_loss
def test_zero_advantage_gives_zero_policy_gradient(estimator, loss: PolicyLoss):
    denoiser, batch, ((*views,), _) = rolled_out(estimator)
    scores = estimator.scores(denoiser, batch, views)
    group = torch.tensor([0, 0, 0, 1, 1])
    advantage = loss.prepare(MeanBaseline()(torch.full((5,), 0.3), group=group), group=group)
    terms = loss(scores, advantage, reference=scores.detach())
    terms.sums["policy"].backward()
    for parameter in denoiser.parameters():
        assert float(parameter.grad.abs().max()) < 1e-6


@every_estimator
@pytest.mark.parametrize("level", ["token", "sequence", "product"])
def test_the_ratio_is_exactly_one_at_the_first_inner_iteration(estimator, level):
    denoiser, batch, plan = rolled_out(estimator)
    with torch.no_grad():
        old = [estimator.scores(denoiser, batch, views) for views in plan]
    advantage = torch.tensor([0.5, -1.0, 2.0, 1.0, -0.25])
    loss = ClippedSurrogate(level=level, loss_normalization="token", beta=0.1, epsilon=0.0)
    for views, before in zip(plan, old, strict=True):
        scores = estimator.scores(denoiser, batch, views)
        terms = loss(scores, advantage, old=before, reference=before)
        expected = -(advantage[:, None] * scores.anywhere).sum()
        torch.testing.assert_close(terms.sums["policy"].detach(), expected, rtol=1e-6, atol=1e-6)
        logged = terms.statistics.values()
        assert logged["clip_ratio/region_mean"] == 0  # with no room at all to be clipped at
        assert logged["kl"] == 0
        without = loss(scores, advantage, reference=before)
        assert torch.equal(without.sums["policy"], terms.sums["policy"])


@every_loss
def test_counts_are_known_before_the_forward_pass(loss: PolicyLoss):
    for estimator in ESTIMATORS:
        denoiser, batch, (views, _) = rolled_out(estimator)
        scores = estimator.scores(denoiser, batch, views)
        terms = loss(scores, torch.ones(5), reference=scores)
        counts = loss.counts(views)
        assert counts.keys() == terms.counts.keys() == terms.sums.keys() == loss.coefficients.keys()
        for name, count in counts.items():
            assert float(count) == pytest.approx(float(terms.counts[name]))


@every_loss
def test_micro_batches_add_up(loss: PolicyLoss):
    old = made_up(1)
    policy, reference = made_up(2, near=old), made_up(3, near=old)

    def part(scores: TokenScores, rows: slice) -> TokenScores:
        return TokenScores(
            scores.log_prob[:, rows], scores.covered[:, rows], scores.weight[:, rows]
        )

    whole = loss(policy, ADVANTAGE, old=old, reference=reference)
    halves = [
        loss(
            part(policy, rows),
            ADVANTAGE[rows],
            old=part(old, rows),
            reference=part(reference, rows),
        )
        for rows in (slice(0, 3), slice(3, 4))
    ]
    for name in whole.sums:
        torch.testing.assert_close(sum(h.sums[name] for h in halves), whole.sums[name])
        assert float(sum(h.counts[name] for h in halves)) == pytest.approx(
            float(whole.counts[name])
        )
    both = (halves[0].statistics + halves[1].statistics).values()
    for name, value in whole.statistics.values().items():
        if not name.endswith(("_min", "_max")):
            assert both[name] == pytest.approx(value)


def test_entropy_is_logged_where_it_was_computed():
    estimator = Coupled()
    denoiser, batch, (views, _) = rolled_out(estimator)
    scores = estimator.scores(denoiser, batch, views, entropy=True)
    for loss in LOSSES:
        logged = loss(scores, torch.ones(5), reference=scores).statistics.values()
        assert logged["entropy"] == pytest.approx(float(scores.entropy[scores.covered].mean()))
    plain = estimator.scores(denoiser, batch, views)
    assert "entropy" not in ClippedSurrogate()(plain, torch.ones(5)).statistics.values()


def test_dropped_rows_take_no_part():
    """A filter leaves rows out of `scored`: no gradient, no count, and no work for the head."""
    denoiser, batch, _ = rolled_out(OneStepMeanField())
    kept = torch.tensor([True, False, True, False, True])
    estimator, loss = OneStepMeanField(), ClippedSurrogate()
    (views,) = estimator.draw(
        batch, VOCABULARY, generator=rng(), scored=batch.target & kept[:, None]
    )
    denoiser.head_rows.clear()
    scores = estimator.scores(denoiser, batch, views)
    assert sum(denoiser.head_rows) == int(batch.target[kept].sum())
    assert int(loss(scores, torch.ones(5)).counts["policy"]) == int(batch.target[kept].sum())


# ---- learning -----------------------------------------------------------------------------------


@every_estimator
@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (ClippedSurrogate(loss_normalization="sequence", beta=0.01), "text"),
        (ClippedSurrogate(level="sequence"), "image"),
        (Wd1(), "text"),
        (Spg(), "image"),
    ],
    ids=["token-text", "sequence-image", "wd1-text", "spg-image"],
)
def test_a_policy_learns_what_is_rewarded(estimator, loss: PolicyLoss, kind: str):
    """The loop of a recipe in small: groups, rollouts, advantages, two inner iterations."""
    policy, reference, generator = TinyDenoiser(scale=0.5), TinyDenoiser(scale=0.5), rng()
    prompts = collate(
        [
            document(6 * (kind == "text"), 6 * (kind == "image"), seed=s, prompt=2 + s)
            for s in range(2)
        ],
        VOCABULARY,
    ).rows(torch.arange(2).repeat_interleave(8))
    group = torch.arange(2).repeat_interleave(8)
    wanted = VOCABULARY.range(1 if kind == "text" else 2)[0] + 4
    sampler = Sampler(steps=3, order=Random(), temperature=1.0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)

    def reward(rollout: Rollout) -> Tensor:
        hit = (rollout.batch.ids == wanted) & rollout.batch.target
        return hit.sum(1) / rollout.batch.target.sum(1)

    rewards = []
    for _ in range(12):
        rollout = Rollout.sample(
            sampler, policy, prompts, generator=generator, ends=(VOCABULARY.pad_id,)
        )
        rewards.append(float(reward(rollout).mean()))
        advantage = loss.prepare(Standardized()(reward(rollout), group=group), group=group)
        plan = estimator.draw(
            rollout.batch,
            VOCABULARY,
            generator=generator,
            iterations=2,
            scored=rollout.scored,
            steps=rollout.steps,
        )
        with torch.no_grad():
            old, fixed = (
                [estimator.scores(model, rollout.batch, views) for views in plan]
                for model in (policy, reference)
            )
        for views, before, anchor in zip(plan, old, fixed, strict=True):
            scores = estimator.scores(policy, rollout.batch, views)
            optimizer.zero_grad()
            loss_of(loss, loss(scores, advantage, old=before, reference=anchor)).backward()
            optimizer.step()
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.15, rewards


# ---- bad input ----------------------------------------------------------------------------------


def test_refuses_what_makes_no_sense():
    for make, message in (
        (lambda: ClippedSurrogate(level="word"), "level 'word' is not one of token, sequence"),
        (lambda: ClippedSurrogate(kl="k2"), "kl 'k2' is not one of k1, k3"),
        (lambda: ClippedSurrogate(epsilon=-0.1), "epsilon must not be negative, got -0.1"),
        (lambda: ClippedSurrogate(loss_normalization="constant"), "'constant' needs a length"),
        (lambda: ClippedSurrogate(length=3), "'constant' needs a length"),
        (lambda: Wd1(psi=0), "psi must be above 0"),
        (lambda: Spg(eubo_beta=0.5), "eubo_beta must be at least 1, got 0.5"),
        (lambda: Spg(mix=2), "mix must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="a KL to the reference needs its scores"):
        ClippedSurrogate(beta=0.1)(made_up(1), ADVANTAGE)
