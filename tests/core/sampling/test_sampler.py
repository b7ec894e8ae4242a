"""Whatever the parts: no mask is left, the context is untouched, and the seed decides the rest."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdlm.core.diffusion.noise import MaskNoise
from mmdlm.core.diffusion.schedule import Cosine, Linear, Shifted
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import (
    Candidates,
    Confidence,
    Entropy,
    LeftToRight,
    Margin,
    Probability,
    Random,
)
from mmdlm.core.sampling.remasking import Remasking
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import (
    Ancestral,
    CatchUpTransfer,
    EntropyBound,
    Factor,
    PlannedTransfer,
    Progress,
    ScheduledTransfer,
    Threshold,
    UniformTransfer,
)
from mmdlm.core.sequence import Batch, Sequence, collate, image_segments, text_segment
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.experimental.neighbor_noise import IdNeighborhood, NeighborNoise
from mmdlm.experimental.uniform import UniformNoise
from tests.core.fakes import (
    TEXT,
    VOCABULARY,
    Factorized,
    TinyDenoiser,
    copies,
    document,
    ragged,
    rng,
    with_features,
)

COSINE = ScheduledTransfer(Cosine())
SAMPLERS = [
    Sampler(steps=6),
    Sampler(steps=100),
    Sampler(steps=1, temperature=1.0),
    Sampler(steps=9, block_length=3, temperature=0.5),
    Sampler(steps=13, block_length=4, order=Random(), temperature=1.0),
    Sampler(steps=5, order=Margin(), temperature=1.0),
    Sampler(steps=5, order=Entropy(), temperature=1.0),
    Sampler(steps=7, order=LeftToRight(), temperature=1.0),
    Sampler(
        steps=8,
        order=Confidence(1.0),
        unmasking=COSINE,
        temperature=1.0,
        guidance=ClassifierFreeGuidance(4.5),
    ),
    Sampler(steps=8, order=Confidence(2.0, "compounding"), unmasking=COSINE, temperature=1.0),
    Sampler(steps=4, unmasking=Threshold(0.3)),
    Sampler(steps=20, unmasking=Threshold(0.5, fallback=COSINE), block_length=5, temperature=1.0),
    Sampler(steps=6, temperature=0.8, top_k=3, top_p=0.7),
    Sampler(steps=8, noise=UniformNoise(), temperature=1.0),
    Sampler(steps=8, noise=NeighborNoise(IdNeighborhood(2)), block_length=7, temperature=1.0),
    Sampler(steps=30, remask=Remasking(0.3), unmasking=COSINE, temperature=1.0),
    Sampler(steps=30, remask=Remasking(1.0, "rescale"), unmasking=COSINE, block_length=5),
    Sampler(steps=12, remask=Remasking(0.5, by_confidence=True), noise=UniformNoise()),
    Sampler(steps=12, remask=Remasking(0.5, between=(0.2, 0.6)), unmasking=Threshold(0.4)),
    Sampler(steps=6, order=Entropy(0.3, "none"), unmasking=Ancestral(), temperature=1.0),
    Sampler(
        steps=9, order=Random(), unmasking=Ancestral(drawn=True), block_length=4, temperature=1.0
    ),
    Sampler(
        steps=9, order=Probability(0.1), unmasking=PlannedTransfer(Shifted(0.3)), block_length=4
    ),
    Sampler(
        steps=5,
        unmasking=Threshold(0.6, fallback=CatchUpTransfer(), exclusive=True),
        temperature=1.0,
    ),
    Sampler(steps=9, unmasking=ScheduledTransfer(Cosine(), least=1, strict=True), temperature=1.0),
    Sampler(
        steps=6,
        temperature=0.7,
        top_k=4,
        top_p=0.8,
        score_after_temperature=True,
        deprioritized_ids=(1, 2),
    ),
]


def in_range(ids: Tensor, batch: Batch) -> bool:
    """Whether every target holds an id of its own modality."""
    for modality in (Modality.TEXT, Modality.IMAGE):
        start, stop = VOCABULARY.range(modality)
        drawn = ids[batch.target & batch.of(modality)]
        if not ((drawn >= start) & (drawn < stop)).all():
            return False
    return True


# ---- what holds for every sampler ---------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS, ids=range(len(SAMPLERS)))
@pytest.mark.parametrize("batch", [ragged(), with_features()], ids=["ragged", "features"])
def test_fills_targets_and_nothing_else(sampler: Sampler, batch: Batch):
    before = {name: value for name, value in vars(batch).items() if value is not None}
    kept = {name: value.clone() for name, value in before.items()}
    out = sampler(TinyDenoiser(), batch, generator=rng())
    assert torch.equal(out.ids[~batch.target], batch.ids[~batch.target])
    assert (out.steps[~batch.target] == -1).all()
    assert in_range(out.ids, batch)  # so that no mask is left
    assert ((out.steps >= 0) & (out.steps < sampler.steps))[batch.target].all()
    assert all(torch.equal(kept[name], getattr(batch, name)) for name in kept)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=range(len(SAMPLERS)))
def test_is_a_function_of_its_inputs_and_the_generator(sampler: Sampler):
    batch, denoiser = ragged(), TinyDenoiser()
    torch.manual_seed(1)
    one = sampler(denoiser, batch, generator=rng(3))
    torch.manual_seed(2)  # the global seed plays no part, nor does what stands at targets
    blank = replace(batch, ids=batch.ids.masked_fill(batch.target, VOCABULARY.mask_id))
    two = sampler(denoiser, blank, generator=rng(3))
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.steps, two.steps)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=range(len(SAMPLERS)))
def test_trajectory_ends_where_the_call_does(sampler: Sampler):
    batch = ragged()
    states = list(sampler.trajectory(TinyDenoiser(), batch, generator=rng()))
    assert [state.step for state in states] == list(range(len(states)))
    assert len(states) <= sampler.steps
    assert torch.equal(states[-1].committed, batch.target)
    assert torch.equal(states[-1].ids, sampler(TinyDenoiser(), batch, generator=rng()).ids)
    for state in states:
        open_ = batch.target & ~state.committed
        if sampler.noise == MaskNoise():
            assert (state.ids[open_] == VOCABULARY.mask_id).all()
            assert (state.ids[~open_] != VOCABULARY.mask_id).all()
        else:
            assert in_range(state.ids, batch)
    if sampler.remask is None:
        for before, after in pairwise(states):
            assert not (before.committed & ~after.committed).any()
            kept = before.committed
            assert torch.equal(before.ids[kept], after.ids[kept])


@pytest.mark.parametrize(
    "unmasking",
    [
        UniformTransfer(),
        COSINE,
        Ancestral(),
        PlannedTransfer(Shifted()),
        Threshold(0.5, fallback=CatchUpTransfer(), exclusive=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("block_length", [None, 3])
def test_rows_are_sampled_as_if_alone(unmasking, block_length):
    """Ragged rows: each goes through its own blocks at its own pace."""
    denoiser, batch = TinyDenoiser(), ragged()
    sampler = Sampler(steps=8, block_length=block_length, unmasking=unmasking)
    together = sampler(denoiser, batch, generator=rng())
    for row in range(len(batch)):
        parts = {k: v[row : row + 1] for k, v in vars(batch).items() if v is not None}
        alone = sampler(denoiser, Batch(**parts), generator=rng())
        assert torch.equal(alone.ids[0], together.ids[row])
        assert torch.equal(alone.steps[0], together.steps[row])


def test_nothing_to_do():
    denoiser = TinyDenoiser()
    batch = collate([Sequence((text_segment([1, 2, 3]),))], VOCABULARY)
    out = Sampler(steps=4)(denoiser, batch, generator=rng())
    assert torch.equal(out.ids, batch.ids)
    assert denoiser.calls == 0


# ---- published loops, written out ---------------------------------------------------------------


@torch.no_grad()
def llada(denoiser, batch: Batch, *, steps: int, block_length: int) -> Tensor:
    """Low-confidence re-masking in blocks, one row, no temperature (arXiv:2502.09992)."""
    x = batch.ids.masked_fill(batch.target, VOCABULARY.mask_id)
    places = batch.target[0].nonzero().flatten().tolist()
    blocks = [places[i : i + block_length] for i in range(0, len(places), block_length)]
    assert steps % len(blocks) == 0
    for block in blocks:
        in_block = steps // len(blocks)
        counts = [len(block) // in_block + (i < len(block) % in_block) for i in range(in_block)]
        for count in counts:
            everywhere = torch.ones_like(batch.target)
            hidden = denoiser.hidden(x, batch)
            probability = denoiser.logits_at(hidden, everywhere, ids=(0, TEXT)).double().softmax(-1)
            best = probability.max(-1)
            masked = [p for p in block if int(x[0, p]) == VOCABULARY.mask_id]
            surest = sorted(masked, key=lambda p: -float(best.values[p]))
            for place in surest[:count]:
                x[0, place] = best.indices[place]
    return x


@pytest.mark.parametrize("steps, block_length", [(12, 12), (4, 12), (12, 4), (6, 4), (9, 4)])
def test_reproduces_llada(steps: int, block_length: int):
    for seed in range(5):
        denoiser = TinyDenoiser(seed=seed)
        batch = collate([document(12, 0, seed=seed, prompt=4)], VOCABULARY)
        sampler = Sampler(steps=steps, block_length=block_length)
        out = sampler(denoiser, batch, generator=rng())
        expected = llada(denoiser, batch, steps=steps, block_length=block_length)
        assert torch.equal(out.ids, expected)


def test_counts_of_an_even_split_put_the_remainder_first():
    batch = collate([document(0, 14)], VOCABULARY)
    out = Sampler(steps=4)(TinyDenoiser(), batch, generator=rng())
    assert torch.bincount(out.steps[batch.target]).tolist() == [4, 4, 3, 3]


def test_counts_of_maskgit_follow_the_cosine():
    n, steps = 64, 9
    batch = copies(document(0, n), 1)
    sampler = Sampler(steps=steps, order=Confidence(1.0), unmasking=COSINE, temperature=1.0)
    out = sampler(Factorized(torch.randn(70, VOCABULARY.size)), batch, generator=rng())
    left = [n] + [math.floor(n * math.cos(math.pi / 2 * (i + 1) / steps)) for i in range(steps)]
    left[-1] = 0
    expected = [before - after for before, after in pairwise(left)]
    assert torch.bincount(out.steps[batch.target]).tolist() == expected


def test_steps_are_split_over_blocks_remainder_first():
    batch = collate([document(12, 0)], VOCABULARY)
    out = Sampler(steps=8, block_length=4)(TinyDenoiser(), batch, generator=rng())
    steps = out.steps[batch.target].view(3, 4)  # 3, 3 and 2 steps
    assert [len(block.unique()) for block in steps] == [3, 3, 2]
    assert int(steps[0].max()) < int(steps[1].min()) <= int(steps[1].max()) < int(steps[2].min())


def test_more_steps_than_tokens_waste_no_forward_pass():
    denoiser, batch = TinyDenoiser(), collate([document(5, 0)], VOCABULARY)
    Sampler(steps=50)(denoiser, batch, generator=rng())
    assert denoiser.calls == 5
    denoiser.calls = 0
    Sampler(steps=50, unmasking=COSINE)(denoiser, batch, generator=rng())
    assert denoiser.calls == 5


# ---- orders and commit rules --------------------------------------------------------------------


def sharp(*probability: float) -> Factorized:
    """Position i of a text gives its best token this probability, the rest is shared evenly."""
    logits = torch.zeros(len(probability), VOCABULARY.size)
    for place, p in enumerate(probability):
        logits[place, 1 + place] = math.log(p * (TEXT - 1) / (1 - p))
    return Factorized(logits)


def free_text(n: int) -> Batch:
    return collate([Sequence((text_segment([0] * n, target=True),))], VOCABULARY)


@pytest.mark.slow
def test_orders():
    batch, denoiser = free_text(4), sharp(0.3, 0.9, 0.5, 0.7)
    for order in (Confidence(), Margin(), Entropy()):
        out = Sampler(steps=4, order=order)(denoiser, batch, generator=rng())
        assert out.steps[0].tolist() == [3, 0, 2, 1]
        assert out.ids[0].tolist() == [1, 2, 3, 4]
    assert Sampler(steps=4, order=LeftToRight())(
        denoiser, batch, generator=rng()
    ).steps.tolist() == [[0, 1, 2, 3]]
    seen = {
        tuple(Sampler(steps=4, order=Random())(denoiser, batch, generator=rng(s)).steps[0].tolist())
        for s in range(150)
    }
    assert len(seen) == 24


def test_margin_and_entropy_differ_from_confidence_where_they_should():
    logits = torch.full((2, VOCABULARY.size), -30.0)
    logits[0, :2] = torch.tensor([0.5, 0.45]).log()  # confident, small margin
    logits[0, 2] = math.log(0.05)
    logits[1, :11] = math.log(0.056)  # less confident, clear margin, much entropy
    logits[1, 0] = math.log(0.44)
    batch, denoiser = free_text(2), Factorized(logits)
    steps = {
        type(order).__name__: Sampler(steps=2, order=order)(denoiser, batch, generator=rng())
        .steps[0]
        .tolist()
        for order in (Confidence(), Margin(), Entropy())
    }
    assert steps == {"Confidence": [0, 1], "Margin": [1, 0], "Entropy": [0, 1]}


def test_confidence_is_that_of_the_drawn_token_without_temperature():
    """At a high temperature an unlikely draw is committed late."""
    batch = free_text(6)
    denoiser = sharp(*[0.9] * 6)
    out = Sampler(steps=6, temperature=4.0)(denoiser, batch, generator=rng(1))
    hit = out.ids[0] == torch.arange(1, 7)
    assert 0 < int(hit.sum()) < 6
    # a likely token was available in the step it was committed in, an unlikely one had to wait
    first_miss = int(out.steps[0][~hit].min())
    drawn = list(Sampler(steps=6, temperature=4.0).trajectory(denoiser, batch, generator=rng(1)))
    assert int((drawn[first_miss].committed & ~hit).sum()) == 1


def test_threshold_commits_the_sure_ones_at_once_and_one_at_least():
    batch, denoiser = free_text(6), sharp(0.95, 0.3, 0.92, 0.5, 0.4, 0.99)
    out = Sampler(steps=6, unmasking=Threshold(0.9))(denoiser, batch, generator=rng())
    assert out.steps[0].tolist() == [0, 3, 0, 1, 2, 0]
    assert denoiser.calls == 4


def test_threshold_keeps_to_its_budget():
    batch, denoiser = free_text(6), sharp(*[0.2] * 6)
    out = Sampler(steps=3, unmasking=Threshold(0.9))(denoiser, batch, generator=rng())
    assert torch.bincount(out.steps[0]).tolist() == [2, 2, 2]


def test_factor_commits_the_more_at_once_the_surer_each_is():
    batch, denoiser = free_text(6), sharp(0.96, 0.3, 0.9, 0.5, 0.4, 0.97)
    # 2 * 0.03, 3 * 0.04 and 4 * 0.1, in the order of their sureness
    for factor, together in ((0.05, 1), (0.1, 1), (0.2, 2), (0.5, 3)):
        out = Sampler(steps=6, unmasking=Factor(factor))(denoiser, batch, generator=rng())
        assert int((out.steps[0] == 0).sum()) == together
    assert out.steps[0].tolist() == [0, 3, 0, 1, 2, 0]


def test_entropy_bound_commits_what_is_nearly_independent():
    batch, denoiser = free_text(6), sharp(0.999, 0.3, 0.99, 0.5, 0.4, 0.9999)
    logits = denoiser.logits[:, :TEXT].log_softmax(-1)
    entropy = torch.special.entr(logits.exp()).sum(-1).sort().values
    for together in (1, 2, 3, 5):
        bound = float(entropy[: together - 1].sum()) + 1e-6
        sampler = Sampler(steps=6, order=Entropy(), unmasking=EntropyBound(bound))
        out = sampler(denoiser, batch, generator=rng())
        assert int((out.steps[0] == 0).sum()) == together
    with pytest.raises(ValueError, match=r"EntropyBound reads entropies off the order Entropy"):
        Sampler(steps=6, unmasking=EntropyBound(0.1))
    with pytest.raises(ValueError, match="without noise"):
        Sampler(steps=6, order=Entropy(1.0), unmasking=EntropyBound(0.1))


def test_in_order_sure_tokens_wait_for_unsure_ones_before_them():
    batch, denoiser = free_text(6), sharp(0.95, 0.92, 0.3, 0.99, 0.5, 0.94)
    for rule, steps in (
        (Threshold(0.9, in_order=True), [0, 0, 1, 2, 3, 4]),
        (Factor(0.4, in_order=True), [0, 0, 1, 2, 3, 4]),
        (Threshold(0.9), [0, 0, 1, 0, 2, 0]),
    ):
        sampler = Sampler(steps=6, order=LeftToRight(), unmasking=rule)
        out = sampler(denoiser, batch, generator=rng())
        assert out.steps[0].tolist() == steps
    by_confidence = [
        Sampler(steps=6, unmasking=Threshold(0.9, in_order=flag))(denoiser, batch, generator=rng())
        for flag in (False, True)
    ]
    assert torch.equal(by_confidence[0].steps, by_confidence[1].steps)  # the order is sureness


def test_distinct_words_are_committed_once_in_a_step():
    batch, eos = free_text(7), VOCABULARY.eos_id
    words = [5, 6, 5, eos, 6, eos, 7]
    sureness = [0.92, 0.97, 0.96, 0.95, 0.97, 0.91, 0.5]
    logits = torch.full((7, VOCABULARY.size), -30.0)
    for place, (word, p) in enumerate(zip(words, sureness, strict=True)):
        rest = (1 - p) / (TEXT - 1)
        logits[place, :TEXT] = torch.tensor(rest).log()
        logits[place, word] = torch.tensor(p).log()
    steps = {}
    for flag in (False, True):
        rules = (Threshold(0.9, distinct=flag), Threshold(0.9, distinct=flag, in_order=True))
        for rule, order in zip(rules, (Confidence(), LeftToRight()), strict=True):
            sampler = Sampler(steps=7, order=order, unmasking=rule)
            out = sampler(Factorized(logits), batch, generator=rng())
            assert out.ids[0].tolist() == words
            steps[flag, rule.in_order] = out.steps[0].tolist()
    assert steps[False, False] == [0, 0, 0, 0, 0, 0, 1]
    # The surest 5, of two equal 6 the left one, ends of text as many as there are.
    assert steps[True, False] == [1, 0, 0, 0, 1, 0, 2]
    assert steps[False, True] == [0, 0, 0, 0, 0, 0, 1]
    # What waits makes wait what comes behind it.
    assert steps[True, True] == [0, 0, 1, 1, 1, 1, 2]


def test_distinct_is_of_words_not_of_the_codes_of_images():
    vocabulary = Vocabulary.build(text_size=TEXT, eos_id=0, image_codes=4)
    segments = image_segments(torch.tensor([2, 2, 2, 1]), vocabulary, target=True)
    batch = collate([Sequence((text_segment([5]), *segments))], vocabulary)
    logits = torch.full((batch.ids.shape[1], vocabulary.size), -30.0)
    logits[torch.arange(len(logits)), batch.ids[0]] = 30.0
    sampler = Sampler(steps=4, unmasking=Threshold(0.9, distinct=True))
    out = sampler(Factorized(logits, vocabulary), batch, generator=rng())
    assert torch.equal(out.ids, batch.ids)
    assert out.steps.amax() == 0


@pytest.mark.parametrize("unmasking", [Factor(0.5), EntropyBound(0.5)], ids=str)
def test_parallel_rules_keep_to_their_budget_and_fill_every_row(unmasking):
    order = Entropy() if isinstance(unmasking, EntropyBound) else Confidence()
    denoiser, batch = TinyDenoiser(scale=5.0), ragged()
    for steps in (3, 12):
        sampler = Sampler(steps=steps, order=order, unmasking=unmasking)
        out = sampler(denoiser, batch, generator=rng())
        assert in_range(out.ids, batch)
        assert bool((out.steps[batch.target] >= 0).all())


def test_threshold_moves_to_the_next_block_at_once():
    batch, denoiser = free_text(6), sharp(0.95, 0.95, 0.95, 0.3, 0.4, 0.95)
    sampler = Sampler(steps=6, block_length=3, unmasking=Threshold(0.9))
    assert sampler(denoiser, batch, generator=rng()).steps[0].tolist() == [0, 0, 0, 3, 2, 1]


def test_noise_of_confidence_decays():
    """Linearly by default; the compounding product is Show-o's and MMaDA's published behavior."""

    def scale(decay, step: int) -> float:
        n, steps = 20_000, 15
        candidates = Candidates(
            logits=torch.zeros(n, 1),
            log_prob=torch.zeros(n),
            column=torch.zeros(n).long(),
            step=torch.full((n,), step),
            steps=torch.full((n,), steps),
        )
        noise = Confidence(1.0, decay).score(candidates, generator=rng())
        return float(noise.std() / (math.pi / math.sqrt(6)))

    assert [scale("linear", i) for i in (0, 7, 14)] == pytest.approx([14 / 15, 7 / 15, 0], rel=0.03)
    published = [0.933, 0.809, 0.647, 0.475]
    assert [scale("compounding", i) for i in range(4)] == pytest.approx(published, rel=0.03)
    assert scale("compounding", 14) == 0
    assert [scale("none", i) for i in (0, 14)] == pytest.approx([1.0, 1.0], rel=0.03)


@pytest.mark.parametrize(
    "rule",
    [
        UniformTransfer(),
        COSINE,
        ScheduledTransfer(Linear()),
        PlannedTransfer(Shifted()),
        Threshold(2.0),
        Threshold(2.0, fallback=CatchUpTransfer()),
    ],
    ids=str,
)
@pytest.mark.parametrize("size, steps", [(7, 3), (3, 7), (1, 1), (64, 18)])
def test_rules_plan_to_fill_the_block(rule, size: int, steps: int):
    left = [
        int(rule.remaining(progress(size, size, step, steps), generator=rng()))
        for step in range(steps)
    ]
    assert left == sorted(left, reverse=True)
    assert left[0] <= size
    assert left[-1] == 0


# ---- draws --------------------------------------------------------------------------------------


def frequencies(sampler: Sampler, logits: Tensor, n: int = 10_000) -> Tensor:
    batch = copies(Sequence((text_segment([0, 0], target=True),)), n)
    denoiser = Factorized(logits.expand(2, -1).contiguous())
    ids = sampler(denoiser, batch, generator=rng()).ids
    return torch.bincount(ids.flatten(), minlength=VOCABULARY.size)[:TEXT] / ids.numel()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 2])
def test_draws_follow_the_softmax_at_every_step(temperature: float, steps: int):
    logits = torch.randn(VOCABULARY.size, generator=rng(2))
    sampler = Sampler(steps=steps, order=Random(), temperature=temperature)
    expected = (logits[:TEXT] / temperature).softmax(-1)
    torch.testing.assert_close(frequencies(sampler, logits), expected, atol=0.015, rtol=0)


def test_rare_tokens_are_drawn():
    """Float32 Gumbel noise cannot exceed 17, so that a token at e^-18 would never come."""
    logits = torch.full((VOCABULARY.size,), -40.0)
    logits[0] = 0.0
    logits[1] = -7.0
    found = frequencies(Sampler(steps=1, temperature=1.0), logits, n=40_000)
    assert float(found[1]) == pytest.approx(math.exp(-7.0), rel=0.25)


def test_top_k_and_top_p():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    logits = torch.cat([logits, torch.full((VOCABULARY.size - 4,), -20.0)])
    two = torch.tensor([4 / 7, 3 / 7])
    for part in ({"top_k": 2}, {"top_p": 0.5}, {"top_p": 0.69}, {"top_k": 2, "top_p": 0.9}):
        found = frequencies(Sampler(steps=1, temperature=1.0, **part), logits)
        torch.testing.assert_close(found[:2], two, atol=0.015, rtol=0)
        assert not found[2:].any()
    for part in ({"top_k": 1}, {"top_p": 1e-6}):
        assert frequencies(Sampler(steps=1, temperature=1.0, **part), logits)[0] == 1.0


@pytest.mark.parametrize("first", [False, True])
def test_which_of_top_k_and_top_p_comes_first(first: bool):
    """Of 0.4, 0.3, 0.2, 0.1: within the two likeliest the first alone has half of the mass."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    logits = torch.cat([logits, torch.full((VOCABULARY.size - 4,), -20.0)])
    sampler = Sampler(steps=1, temperature=1.0, top_k=2, top_p=0.5, top_p_first=first)
    expected = torch.tensor([4 / 7, 3 / 7] if first else [1.0, 0.0])
    torch.testing.assert_close(frequencies(sampler, logits)[:2], expected, atol=0.015, rtol=0)


def test_top_k_beyond_the_range_is_no_restriction():
    logits = torch.randn(VOCABULARY.size, generator=rng(2))
    free, wide = (
        frequencies(Sampler(steps=1, temperature=1.0, top_k=k), logits, n=200) for k in (None, 999)
    )
    assert torch.equal(free, wide)


def test_suppressed_ids_are_never_drawn():
    logits = torch.zeros(VOCABULARY.size)
    logits[3] = 9.0
    found = frequencies(Sampler(steps=1, temperature=1.0, suppress_tokens=(3, 5)), logits, n=2000)
    assert float(found[3]) == float(found[5]) == 0.0
    assert (found[[0, 1, 2, 4]] > 0).all()
    order = Sampler(steps=2, suppress_tokens=(3,), order=Entropy())  # -inf in an entropy
    assert order(Factorized(logits.expand(4, -1)), free_text(4), generator=rng()).ids.max() < TEXT


@pytest.mark.parametrize("least", [0, 1, 3])
def test_a_text_does_not_end_before_so_many_tokens(least: int):
    """Codes before it do not count."""
    logits = torch.zeros(30, VOCABULARY.size)
    logits[:, [0, 4]] = 9.0  # both are ends, likely everywhere; 7 comes next
    logits[:, 7] = 5.0
    sampler = Sampler(steps=20, stop_ids=(0, 4), min_new_tokens=least, order=LeftToRight())
    batch = copies(document(6, 5, prompt=2), 2)
    out = sampler(Factorized(logits), batch, generator=rng())
    text = batch.target & batch.of(Modality.TEXT)
    for ids, steps in zip(out.ids[text].view(2, 6), out.steps[text].view(2, 6), strict=True):
        assert ids[: least + 1].tolist() == [7] * least + [0]
        assert (steps[least + 1 :] == -1).all()  # nothing is committed behind the end
    taken_back = replace(sampler, remask=Remasking(0.2))(Factorized(logits), batch, generator=rng())
    assert (taken_back.ids[text].view(2, 6)[:, :least] == 7).all()
    assert (taken_back.steps[text] >= 0).all()


def test_a_text_may_take_ids_of_the_whole_vocabulary():
    logits = torch.zeros(5, VOCABULARY.size)
    logits[:, VOCABULARY.image[0]] = 9.0
    logits[:, VOCABULARY.mask_id] = 20.0  # still not drawn
    whole = Sampler(steps=2, full_vocabulary=True)
    ids = whole(Factorized(logits), free_text(4), generator=rng()).ids
    assert (ids == VOCABULARY.image[0]).all()
    image = collate([document(0, 3)], VOCABULARY)  # codes stay codes
    assert in_range(whole(Factorized(-logits), image, generator=rng()).ids, image)


@pytest.mark.parametrize("unmasking", [UniformTransfer(), Ancestral()], ids=str)
def test_a_mask_that_is_drawn_stays_open(unmasking):
    """It may still be there in the end; a plan of counts does not wait for it."""
    logits = torch.zeros(5, VOCABULARY.size)
    logits[:, 2] = torch.arange(5) / 10 + 5
    logits[3, VOCABULARY.mask_id] = 5.9  # the likeliest there, though the least sure of all
    sampler = Sampler(steps=5, unmasking=unmasking, full_vocabulary=True, allow_mask_token=True)
    out = sampler(Factorized(logits), free_text(5), generator=rng())
    assert out.ids.tolist() == [[2, 2, 2, VOCABULARY.mask_id, 2]]
    assert out.steps[0, 3] == -1
    for state in sampler.trajectory(Factorized(logits), free_text(5), generator=rng()):
        assert not bool(state.committed[0, 3])


def test_a_mask_id_inside_the_text_range_is_never_drawn():
    """As in LLaDA's vocabulary."""
    vocabulary = replace(VOCABULARY, mask_id=4)
    logits = torch.zeros(6, vocabulary.size)
    logits[:, 4] = 20.0
    batch = collate([Sequence((text_segment([1] * 6, target=True),))], vocabulary)
    for temperature in (0.0, 1.0):
        out = Sampler(steps=3, temperature=temperature)(
            Factorized(logits, vocabulary), batch, generator=rng()
        )
        assert (out.ids != 4).all()


class Pair(nn.Module):
    """The exact conditionals of a joint distribution p(a, b) over two text tokens of 3 values."""

    vocabulary = VOCABULARY

    def __init__(self, joint: Tensor):
        super().__init__()
        self.joint = joint

    def hidden(self, x_t: Tensor, batch: Batch, **_: Any) -> Tensor:
        logits = torch.full((*x_t.shape, VOCABULARY.size), -math.inf)
        for place in (0, 1):
            table = self.joint if place == 0 else self.joint.T  # [own, other]
            other = x_t[:, 1 - place]
            known = table[:, other.clamp_max(2)].T
            free = table.sum(1).expand(len(x_t), -1)
            logits[:, place, :3] = torch.where((other < 3)[:, None], known, free).log()
        return logits

    def head_weight(self) -> None:
        """None: tests count what `logits_at` is asked for."""

    def logits_at(self, hidden: Tensor, positions: Tensor, *, ids=None) -> Tensor:
        return hidden[positions][:, slice(*ids)]


@pytest.mark.parametrize("order", [Random(), LeftToRight(), Entropy()], ids=str)
def test_one_token_at_a_time_samples_the_joint_distribution(order):
    joint = torch.tensor([[0.3, 0.05, 0.0], [0.05, 0.2, 0.1], [0.0, 0.05, 0.25]])
    n = 20_000
    batch = copies(Sequence((text_segment([0, 0], target=True),)), n)
    ids = Sampler(steps=2, order=order, temperature=1.0)(Pair(joint), batch, generator=rng()).ids
    found = torch.bincount(ids[:, 0] * 3 + ids[:, 1], minlength=9).view(3, 3) / n
    torch.testing.assert_close(found, joint, atol=0.012, rtol=0)


# ---- efficiency ---------------------------------------------------------------------------------


def test_the_head_runs_at_open_positions_of_the_block_only():
    denoiser, batch = TinyDenoiser(), collate([document(12, 0, prompt=9)], VOCABULARY)
    Sampler(steps=6, block_length=4)(denoiser, batch, generator=rng())
    assert denoiser.calls == 6
    assert denoiser.head_rows[0::2] == [4, 2, 4, 2, 4, 2]  # text
    assert denoiser.head_rows[1::2] == [0] * 6  # image


def test_guidance_off_costs_nothing_and_on_costs_no_second_call():
    batch = ragged()
    plain, guided = TinyDenoiser(), TinyDenoiser()
    off = Sampler(steps=4)(plain, batch, generator=rng())
    on = Sampler(steps=4, guidance=ClassifierFreeGuidance(3.0))(guided, batch, generator=rng())
    assert plain.calls == guided.calls
    assert not torch.equal(off.ids, on.ids)


def test_a_negative_prompt_changes_the_result():
    batch = ragged()
    other = replace(batch, ids=torch.where(batch.target, batch.ids, batch.ids.clamp_max(2)))
    sampler = Sampler(steps=4, guidance=ClassifierFreeGuidance(3.0))
    default = sampler(TinyDenoiser(), batch, generator=rng())
    steered = sampler(TinyDenoiser(), batch, generator=rng(), unconditional=other)
    assert not torch.equal(default.ids, steered.ids)


def test_no_gradient_is_kept():
    denoiser = TinyDenoiser()
    states = Sampler(steps=3).trajectory(denoiser, ragged(), generator=rng())
    next(states)
    assert torch.is_grad_enabled()  # also between two steps
    assert not any(state.ids.requires_grad for state in states)


# ---- changes of mind ----------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [MaskNoise(), UniformNoise()], ids=str)
def test_remasking_takes_tokens_back_and_keeps_the_plan(noise):
    n, steps = 40, 25
    batch = collate([document(0, n)], VOCABULARY)
    sampler = Sampler(
        steps=steps, unmasking=COSINE, remask=Remasking(0.4), noise=noise, temperature=1.0
    )
    states = list(sampler.trajectory(TinyDenoiser(), batch, generator=rng()))
    assert len(states) == steps
    taken_back = 0
    for step, (before, after) in enumerate(pairwise(states), start=1):
        taken_back += int((before.committed & ~after.committed).sum())
        left = n - int(after.committed.sum())
        plan = math.floor(n * math.cos(math.pi / 2 * (step + 1) / steps)) if step + 1 < steps else 0
        assert left == plan
    assert taken_back > n / 2
    out = sampler(TinyDenoiser(), batch, generator=rng())
    for place in batch.target[0].nonzero().flatten().tolist():
        step = int(out.steps[0, place])
        assert all(bool(s.committed[0, place]) for s in states[step:])
        assert step == 0 or not bool(states[step - 1].committed[0, place])


def test_more_steps_than_tokens_are_used_for_second_thoughts():
    denoiser, batch = TinyDenoiser(), collate([document(0, 8)], VOCABULARY)
    Sampler(steps=40, unmasking=COSINE, remask=Remasking(0.5))(denoiser, batch, generator=rng())
    assert denoiser.calls == 37  # floor(8 cos(pi / 2 * 37 / 40)) is 0: no room after that


def progress(size: int, open_: int, step: int = 5, steps: int = 10) -> Progress:
    return Progress(*(torch.tensor([n]) for n in (size, open_, step, steps)))


@pytest.mark.parametrize(
    "remask, expected",
    [
        (Remasking(0.2), 0.2 * 60),
        (Remasking(0.9), 30),  # all the room there is
        (Remasking(0.5, "rescale"), 0.5 * 30),
        (Remasking(0.2, between=(0.6, 1.0)), 0),
    ],
    ids=str,
)
def test_remasking_rate(remask: Remasking, expected: float):
    committed = torch.zeros(1, 100, dtype=torch.bool)
    committed[0, :60] = True
    counts = [
        int(
            remask.choose(
                committed,
                torch.rand(1, 100),
                remaining=torch.tensor([30]),
                progress=progress(100, 40),
                generator=rng(seed),
            ).sum()
        )
        for seed in range(50)
    ]
    assert sum(counts) / 50 == pytest.approx(expected, abs=0.2)
    assert max(counts) <= 30


def test_remasking_rate_is_kept_on_average_where_it_is_a_fraction():
    committed = torch.ones(4000, 3, dtype=torch.bool)
    again = Remasking(0.1).choose(
        committed,
        torch.rand(4000, 3),
        remaining=torch.full((4000,), 3),
        progress=Progress(*(torch.full((4000,), n) for n in (6, 3, 5, 10))),
        generator=rng(),
    )
    assert float(again.float().mean()) == pytest.approx(0.1, rel=0.1)


def test_remasking_by_confidence_takes_back_the_unsure():
    committed = torch.ones(5000, 2, dtype=torch.bool)
    probability = torch.tensor([0.9, 0.1]).expand(5000, 2)
    again = Remasking(0.5, by_confidence=True).choose(
        committed,
        probability,
        remaining=torch.full((5000,), 2),
        progress=Progress(*(torch.full((5000,), n) for n in (4, 2, 5, 10))),
        generator=rng(),
    )
    expected = torch.tensor([-0.9, -0.1]).softmax(-1)  # one of the two in each row
    torch.testing.assert_close(again.float().mean(0), expected, atol=0.03, rtol=0)


# ---- the uniform process ------------------------------------------------------------------------


def test_open_positions_are_drawn_anew_each_step():
    batch = collate([document(10, 30)], VOCABULARY)
    sampler = Sampler(steps=5, noise=UniformNoise())
    states = list(sampler.trajectory(TinyDenoiser(), batch, generator=rng()))
    for before, after in pairwise(states):
        open_ = batch.target & ~after.committed
        if int(open_.sum()) > 5:
            assert not torch.equal(before.ids[open_], after.ids[open_])
        assert torch.equal(after.ids[before.committed], before.ids[before.committed])


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 4, "block_length": 0}, "block_length must be at least 1, got 0"),
        ({"steps": 4, "temperature": -1.0}, "temperature must not be negative, got -1.0"),
        ({"steps": 4, "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"steps": 4, "top_p": 1.5}, "top_p must lie in"),
    ],
)
def test_refuses_impossible_options(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Sampler(**options)


def test_refuses_a_remasking_rate_beyond_1():
    with pytest.raises(ValueError, match="eta must lie"):
        Remasking(1.5)


def test_refuses_fewer_steps_than_blocks():
    batch = collate([document(12, 0)], VOCABULARY)
    with pytest.raises(ValueError, match="2 steps are too few for 3 blocks of 4 tokens"):
        Sampler(steps=2, block_length=4)(TinyDenoiser(), batch, generator=rng())


def test_refuses_images_of_a_text_model():
    vocabulary = Vocabulary.build(text_size=TEXT, eos_id=0)
    batch = collate([document(2, 4)], VOCABULARY)
    with pytest.raises(ValueError, match="IMAGE tokens"):
        Sampler(steps=2)(TinyDenoiser(vocabulary), batch, generator=rng())
