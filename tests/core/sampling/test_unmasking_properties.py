"""What holds of every unmasking rule, in each step and over a whole run of the sampler."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmdlm.core.diffusion.schedule import Cosine, Linear, Shifted
from mmdlm.core.sampling.order import Entropy
from mmdlm.core.sampling.remasking import Remasking
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import (
    Ancestral,
    CatchUpTransfer,
    EntropyBound,
    Factor,
    Parallel,
    PlannedTransfer,
    Progress,
    ScheduledTransfer,
    Threshold,
    UniformTransfer,
    UnmaskingRule,
    highest,
)
from mmdlm.core.sequence import Batch, Sequence, collate, text_segment
from mmdlm.experimental.schedules import LogLinear, Polynomial
from tests import properties  # noqa: F401 (its settings)
from tests.core.fakes import TEXT, VOCABULARY, TinyDenoiser, document, rng

SCHEDULES = st.one_of(
    st.builds(Linear, st.floats(0, 0.5)),
    st.just(Cosine()),
    st.builds(Polynomial, st.floats(0.3, 4)),
    st.builds(LogLinear, st.floats(0, 0.5)),
    st.builds(Shifted, st.floats(0.1, 8)),
)
PLANNED = st.one_of(
    st.just(UniformTransfer()),
    st.builds(ScheduledTransfer, SCHEDULES, least=st.integers(0, 2), strict=st.booleans()),
    st.builds(PlannedTransfer, SCHEDULES),
)
COUNTED = st.one_of(  # those that say how many, and commit the tokens of highest score
    PLANNED,
    st.builds(Ancestral, SCHEDULES, drawn=st.booleans()),
    st.builds(CatchUpTransfer, SCHEDULES),
)
OPTIONS = {
    "fallback": COUNTED,
    "exclusive": st.booleans(),
    "in_order": st.booleans(),
    "distinct": st.booleans(),
}
PARALLEL = st.one_of(
    st.builds(Threshold, st.floats(0, 1.1), **OPTIONS),
    st.builds(Factor, st.floats(0, 3), **OPTIONS),
    st.builds(EntropyBound, st.floats(0, 3), **OPTIONS),
)
RULES = st.one_of(COUNTED, PARALLEL)
COUNTS = st.integers(1, 40)
DENOISER = TinyDenoiser()


def progress(size: int, open_: int, step: int, steps: int) -> Progress:
    return Progress(*(torch.tensor([number]) for number in (size, open_, step, steps)))


def left_open(rule: UnmaskingRule, size: int, steps: int) -> list[int]:
    """How many of a block are open before the first step and after each, as the rule has it."""
    left = [size]
    for step in range(steps):
        remaining = rule.remaining(progress(size, left[-1], step, steps), generator=rng())
        left.append(0 if step + 1 == steps else min(int(remaining), left[-1]))
    return left


# ---- how many -----------------------------------------------------------------------------------


@given(COUNTED, COUNTS, COUNTS)
def test_counts_add_up_to_the_block(rule: UnmaskingRule, size: int, steps: int) -> None:
    left = left_open(rule, size, steps)
    assert left == sorted(left, reverse=True)
    assert sum(before - after for before, after in pairwise(left)) == size
    assert min(left) >= 0


@given(PLANNED, COUNTS, COUNTS)
def test_a_plan_does_not_depend_on_what_is_open(rule: UnmaskingRule, size: int, steps: int) -> None:
    assert rule.planned
    for step in range(steps):
        wanted = {
            int(rule.remaining(progress(size, open_, step, steps), generator=rng(seed)))
            for seed, open_ in enumerate((0, 1, size))
        }
        assert len(wanted) == 1


@given(COUNTS, COUNTS)
def test_an_even_split_is_even_and_its_remainder_comes_first(size: int, steps: int) -> None:
    counts = [
        before - after for before, after in pairwise(left_open(UniformTransfer(), size, steps))
    ]
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@given(SCHEDULES, st.booleans(), COUNTS, COUNTS)
def test_a_scheduled_count_is_within_a_token_of_the_schedule(
    schedule, strict: bool, size: int, steps: int
) -> None:
    rule = ScheduledTransfer(schedule, strict=strict)
    for step in range(steps):
        t = torch.tensor(1 - (step + 1) / steps, dtype=torch.float64)
        expected = size * float(schedule.p_mask(t))
        left = int(rule.remaining(progress(size, size, step, steps), generator=rng()))
        assert max(expected - 1 - 1e-9, 0) <= left <= expected + 1e-9


@given(SCHEDULES, COUNTS, COUNTS)
def test_a_planned_count_commits_in_every_step_until_all_is_done(
    schedule, size: int, steps: int
) -> None:
    counts = [b - a for b, a in pairwise(left_open(PlannedTransfer(schedule), size, steps))]
    assert all(count >= 1 for count in counts[: min(size, steps)])


@given(SCHEDULES, COUNTS, st.integers(0, 40), COUNTS)
def test_catching_up_always_commits(schedule, size: int, open_: int, steps: int) -> None:
    open_ = min(open_, size)
    for step in range(steps):
        left = CatchUpTransfer(schedule).remaining(
            progress(size, open_, step, steps), generator=rng()
        )
        assert int(left) < max(open_, 1)


@given(SCHEDULES, st.booleans(), COUNTS, COUNTS, st.integers(0, 99))
def test_ancestral_steps_keep_to_what_is_open(
    schedule, drawn: bool, open_: int, steps: int, seed: int
) -> None:
    for step in range(steps):
        now = progress(open_, open_, step, steps)
        left = Ancestral(schedule, drawn=drawn).remaining(now, generator=rng(seed))
        assert 0 <= int(left) <= open_


# ---- which --------------------------------------------------------------------------------------

ROW = st.integers(1, 12).flatmap(
    lambda length: st.tuples(
        st.lists(st.floats(0.01, 1), min_size=length, max_size=length),  # probabilities
        st.lists(st.booleans(), min_size=length, max_size=length),  # open ones
        st.lists(st.integers(-1, 3), min_size=length, max_size=length),  # words
        st.integers(0, length + 2),  # how many
    )
)
Row = tuple[list[float], list[bool], list[int], int]


def choose(rule: UnmaskingRule, row: Row, now: Progress) -> tuple[Tensor, Tensor, Tensor]:
    """What a rule chooses, the scores, and which are open; [L] each."""
    probability, among, words = map(torch.tensor, row[:3])
    score = probability.double()
    chosen = rule.choose(
        score[None],
        probability[None],
        words=words[None],
        among=among[None],
        count=torch.tensor([row[3]]),
        progress=now,
    )
    return chosen[0], score, among


@given(ROW)
def test_the_highest_are_the_highest(row: Row) -> None:
    score, among, count = torch.tensor(row[0]), torch.tensor(row[1]), row[3]
    chosen = highest(score[None], among[None], torch.tensor([count]))[0]
    assert int(chosen.sum()) == min(count, int(among.sum()))
    assert not (chosen & ~among).any()
    if chosen.any() and (among & ~chosen).any():
        least, most = score[chosen].min(), score[among & ~chosen].max()
        assert least >= most
        if least == most:  # ties go to the left
            last = (chosen & (score == least)).nonzero().max()
            first = (among & ~chosen & (score == most)).nonzero().min()
            assert last < first


@given(RULES, ROW)
def test_only_open_tokens_are_chosen_and_no_fewer_than_asked_for(
    rule: UnmaskingRule, row: Row
) -> None:
    chosen, score, among = choose(rule, row, progress(12, 12, 0, 4))
    assert chosen.dtype == torch.bool
    assert not (chosen & ~among).any()
    wanted = min(row[3], int(among.sum()))
    if getattr(rule, "exclusive", False):  # the sure ones, if any; else as many as wanted
        assert int(chosen.sum()) >= min(wanted, 1)
    else:
        assert int(chosen.sum()) >= wanted
        assert (chosen | ~highest(score[None], among[None], torch.tensor([wanted]))[0]).all()


@given(PARALLEL, ROW)
def test_the_last_step_takes_all_that_is_asked_for(rule: Parallel, row: Row) -> None:
    among = torch.tensor(row[1])
    chosen, *_ = choose(rule, (*row[:3], len(among)), progress(12, 12, 3, 4))
    assert torch.equal(chosen, among)


@given(st.floats(0, 1.1), ROW)
def test_a_threshold_is_one(threshold: float, row: Row) -> None:
    chosen, _, among = choose(Threshold(threshold), (*row[:3], 0), progress(12, 12, 0, 4))
    assert torch.equal(chosen, among & (torch.tensor(row[0]) >= threshold))


@given(PARALLEL, ROW)
def test_in_order_no_gap_is_left(rule: Parallel, row: Row) -> None:
    rule = replace(rule, in_order=True)
    chosen, score, among = choose(rule, row, progress(12, 12, 0, 4))
    whole = highest(score[None], among[None], chosen.sum()[None])[0]
    assert torch.equal(chosen, whole)


@given(PARALLEL, ROW)
def test_of_a_word_one_token_is_sure(rule: Parallel, row: Row) -> None:
    rule = replace(rule, distinct=True)
    chosen, *_ = choose(rule, (*row[:3], 0), progress(12, 12, 0, 4))
    words = [word for word, here in zip(row[2], chosen.tolist(), strict=True) if here and word >= 0]
    assert len(words) == len(set(words))


@given(PARALLEL, ROW)
def test_more_is_sure_the_lower_the_bar(rule: Parallel, row: Row) -> None:
    now = progress(12, 12, 0, 4)
    plain = replace(rule, exclusive=False, in_order=False, distinct=False)
    name, lower = {
        Threshold: ("threshold", -0.2),
        Factor: ("factor", 0.5),
        EntropyBound: ("bound", 0.5),
    }[type(rule)]
    before, *_ = choose(plain, row, now)
    after, *_ = choose(replace(plain, **{name: getattr(plain, name) + lower}), row, now)
    assert (after | ~before).all()


@given(
    st.builds(
        Remasking,
        st.floats(0, 1),
        rule=st.sampled_from(["cap", "rescale"]),
        by_confidence=st.booleans(),
    ),
    ROW,
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_what_goes_back_was_committed_and_is_no_more_than_may_be_open(
    remask: Remasking, row: Row, step: int, seed: int
) -> None:
    committed = torch.tensor([row[1]])
    again = remask.choose(
        committed,
        torch.tensor([row[0]]),
        remaining=torch.tensor([row[3]]),
        progress=progress(12, 12, step, 4),
        generator=rng(seed),
    )
    assert not (again & ~committed).any()
    assert int(again.sum()) <= row[3]
    if remask.eta == 0:
        assert not again.any()


# ---- a whole run --------------------------------------------------------------------------------

BATCHES = st.lists(
    st.tuples(st.integers(0, 6), st.sampled_from([0, 4]), st.integers(0, 3)), min_size=1, max_size=3
).map(
    lambda rows: collate(
        [document(text, codes, prompt=prompt) for text, codes, prompt in rows], VOCABULARY
    )
)


@st.composite
def samplers(draw: st.DrawFn, rules: st.SearchStrategy[UnmaskingRule] = RULES) -> Sampler:
    """A sampler that has steps enough for the blocks of `BATCHES`."""
    rule = draw(rules)
    block_length = draw(st.sampled_from([None, 2, 3, 5]))
    blocks = 1 if block_length is None else -(-10 // block_length)
    options = {"order": Entropy()} if isinstance(rule, EntropyBound) else {}
    return Sampler(
        steps=draw(st.integers(blocks, blocks + 7)),
        block_length=block_length,
        unmasking=rule,
        temperature=draw(st.sampled_from([0.0, 1.0])),
        **options,
    )


@given(samplers(), BATCHES, st.integers(0, 99))
def test_each_target_is_committed_once_and_nothing_else_changes(
    sampler: Sampler, batch: Batch, seed: int
) -> None:
    before = torch.zeros_like(batch.target)
    ids, counts = batch.ids, []
    for step in sampler.trajectory(DENOISER, batch, generator=rng(seed)):
        assert not (before & ~step.committed).any()  # what is committed stays so
        assert not (step.committed & ~batch.target).any()
        assert torch.equal(step.ids[before], ids[before])
        assert torch.equal(step.ids[~batch.target], batch.ids[~batch.target])
        assert (step.ids[batch.target & ~step.committed] == VOCABULARY.mask_id).all()
        counts.append((step.committed & ~before).sum(1))
        before, ids = step.committed, step.ids
    assert torch.equal(before, batch.target)
    assert sum(counts, torch.zeros(len(batch))).tolist() == batch.target.sum(1).tolist()
    assert not (ids[batch.target] == VOCABULARY.mask_id).any()


@given(samplers(), BATCHES, st.integers(0, 99))
def test_every_step_commits_one_token_at_least(sampler: Sampler, batch: Batch, seed: int) -> None:
    """Of each row that has open ones; of an ancestral rule the last step of a block alone."""
    rule = getattr(sampler.unmasking, "fallback", sampler.unmasking)
    before = torch.zeros_like(batch.target)
    for step in sampler.trajectory(DENOISER, batch, generator=rng(seed)):
        fresh = (step.committed & ~before).any(1)
        has_open = (batch.target & ~before).any(1)
        assert not (fresh & ~has_open).any()
        if not isinstance(rule, Ancestral):
            assert torch.equal(fresh, has_open)
        before = step.committed


@given(samplers(), BATCHES, st.integers(0, 99))
def test_blocks_come_one_after_the_other(sampler: Sampler, batch: Batch, seed: int) -> None:
    steps = sampler(DENOISER, batch, generator=rng(seed)).steps
    length = sampler.block_length or batch.ids.shape[1]
    for row, target in zip(steps, batch.target, strict=True):
        taken = row[target].tolist()
        blocks = [taken[start : start + length] for start in range(0, len(taken), length)]
        assert all(0 <= step < sampler.steps for step in taken)
        assert all(max(one) < min(after) for one, after in pairwise(blocks))


@given(samplers(PLANNED), st.integers(1, 10), st.integers(0, 99))
def test_a_plan_is_kept_to_the_token(sampler: Sampler, size: int, seed: int) -> None:
    sampler = replace(sampler, block_length=None)
    row = Sequence((text_segment([number % TEXT for number in range(size)], target=True),))
    steps = sampler(DENOISER, collate([row], VOCABULARY), generator=rng(seed)).steps
    made = [size - int((steps <= step).sum()) for step in range(sampler.steps)]
    plan = left_open(sampler.unmasking, size, sampler.steps)[1:]
    floor = accumulate(plan, lambda left, wanted: max(0, min(left - 1, wanted)), initial=size)
    assert made == list(floor)[1:]
