"""Rollouts of ragged prompts are those of each prompt alone, and rows stop at their own end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import LeftToRight
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import Threshold, UniformTransfer
from mmdlm.core.sequence import Batch, Sequence, collate, image_segments, text_segment
from mmdlm.core.vocabulary import Modality
from mmdlm.rl.rollout import Rollout
from tests.core.fakes import (
    CODES,
    VOCABULARY,
    Factorized,
    TinyDenoiser,
    document,
    ragged,
    rng,
    with_features,
)


class Watched(TinyDenoiser):
    """Notes how many rows each forward pass has."""

    def __init__(self, **options):
        super().__init__(**options)
        self.rows: list[int] = []

    def hidden(self, x_t: Tensor, batch: Batch, **_: Any) -> Tensor:
        assert len(x_t) == len(batch)
        self.rows.append(len(x_t))
        return super().hidden(x_t, batch)


def prompts(*lengths: int, answer: int = 6) -> Batch:
    return collate(
        [document(answer, 0, seed=i, prompt=n) for i, n in enumerate(lengths)], VOCABULARY
    )


def alone(batch: Batch, row: int) -> Batch:
    """One row without its padding."""
    (kept,) = (~batch.is_padding[row : row + 1]).nonzero(as_tuple=True)[1:]
    values = {
        name: None if value is None else value[row : row + 1, kept]
        for name, value in vars(batch).items()
    }
    return Batch(**values)


# ---- one batch of many prompts ------------------------------------------------------------------


@pytest.mark.parametrize(
    "unmasking", [UniformTransfer(), Threshold(0.4)], ids=["even", "threshold"]
)
def test_a_ragged_batch_rolls_out_as_its_rows_do_alone(unmasking):
    batch, sampler = prompts(2, 7, 0, 4), Sampler(steps=6, block_length=3, unmasking=unmasking)
    together = Rollout.sample(sampler, TinyDenoiser(), batch, generator=rng())
    for row in range(len(batch)):
        one = alone(batch, row)
        own = Rollout.sample(sampler, TinyDenoiser(), one, generator=rng())
        n = one.ids.shape[1]
        assert torch.equal(together.batch.ids[row, :n], own.batch.ids[0])
        assert torch.equal(together.steps[row, :n], own.steps[0])
        assert torch.equal(together.scored[row, :n], own.scored[0])
        torch.testing.assert_close(together.log_prob[row, :n], own.log_prob[0])
        assert bool(together.ended[row]) == bool(own.ended[0])


def test_keeps_prompts_and_fills_answers():
    batch = ragged()
    rollout = Rollout.sample(
        Sampler(steps=9, temperature=1.0), TinyDenoiser(), batch, generator=rng()
    )
    assert torch.equal(rollout.batch.ids[~batch.target], batch.ids[~batch.target])
    assert not (rollout.batch.ids[batch.target] == VOCABULARY.mask_id).any()
    assert ((rollout.steps >= 0) == batch.target).all()
    assert torch.equal(rollout.batch.target, batch.target)
    assert (rollout.log_prob[batch.target] < 0).all()
    assert not (rollout.scored & ~batch.target).any()


def test_log_probability_is_that_of_the_logits_before_temperature():
    logits = torch.randn(16, VOCABULARY.size, generator=rng())
    batch = prompts(2, 3)
    for sampler in (
        Sampler(steps=3, temperature=0.3, top_k=2),
        Sampler(steps=3, temperature=1.0, top_p=0.5, score_after_temperature=True),
        Sampler(steps=3, temperature=1.0, deprioritized_ids=(1, 2, 3)),
    ):
        rollout = Rollout.sample(sampler, Factorized(logits), batch, generator=rng())
        for row, column in batch.target.nonzero().tolist():
            start, stop = VOCABULARY.text
            own = logits[int(batch.position[row, column]), start:stop].log_softmax(-1)
            drawn = int(rollout.batch.ids[row, column])
            torch.testing.assert_close(rollout.log_prob[row, column], own[drawn])


# ---- what counts --------------------------------------------------------------------------------


def factorized(words: list[int]) -> Factorized:
    """A model that says `words` from position 0 on."""
    logits = torch.zeros(16, VOCABULARY.size)
    logits[torch.arange(len(words)), words] = 20.0
    return Factorized(logits)


EOS = VOCABULARY.eos_id
SAID = [5, 6, EOS, 7, EOS, 8]


def test_a_text_is_scored_up_to_its_end():
    batch = collate([document(6, 0, prompt=0)], VOCABULARY)
    shift = int(batch.target[0].long().argmax())  # the markers of no image stand before
    model = factorized([9] * shift + SAID)
    rollout = Rollout.sample(Sampler(steps=6), model, batch, generator=rng())
    assert rollout.scored[0, shift:].tolist() == [True, True, True, False, False, False]
    assert rollout.batch.ids[0, shift:].tolist() == SAID  # it was sampled to the end
    assert rollout.ended.tolist() == [True]
    assert rollout.lengths.tolist() == [3]
    assert [answer.tolist() for answer in rollout.answers()] == [[5, 6, EOS]]
    with_tail = Rollout.sample(Sampler(steps=6), model, batch, generator=rng(), tail=2)
    assert with_tail.scored[0, shift:].tolist() == [True] * 5 + [False]
    other = Rollout.sample(Sampler(steps=6), model, batch, generator=rng(), ends=(7,))
    assert other.lengths.tolist() == [4]
    never = Rollout.sample(Sampler(steps=6), model, batch, generator=rng(), ends=(10,))
    assert never.ended.tolist() == [False]
    assert never.lengths.tolist() == [6]


def test_each_text_of_a_row_has_its_own_end():
    codes = torch.randint(CODES, (3,), generator=rng())
    row = Sequence(
        (
            text_segment([1, 2, 3], target=True),
            *image_segments(codes, VOCABULARY, target=True),
            text_segment([1, 2, 3, 4], target=True),
        )
    )
    batch = collate([row], VOCABULARY)
    code = VOCABULARY.image[0] + 2
    words = [5, EOS, 6, 0, code, code, code, 0, 7, 8, 9, 10]
    sampler = Sampler(steps=10, stop_ids=(EOS,), order=LeftToRight())
    rollout = Rollout.sample(sampler, factorized(words), batch, generator=rng())
    yes, no = True, False
    assert rollout.scored[0].tolist() == [yes, yes, no, no, yes, yes, yes, no, yes, yes, yes, yes]
    assert rollout.ended.tolist() == [False]  # the end of the first text is not that of the row
    assert (rollout.steps[batch.target[0][None]] >= 0).all()
    assert rollout.answers(Modality.IMAGE)[0].tolist() == [code] * 3


def test_a_image_needs_no_end():
    batch = collate([document(0, 8, prompt=3)], VOCABULARY)
    rollout = Rollout.sample(Sampler(steps=4), TinyDenoiser(), batch, generator=rng())
    assert rollout.ended.tolist() == [True]
    assert torch.equal(rollout.scored, batch.target)


# ---- early stop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [prompts(2, 7, 0, 4, answer=9), with_features()])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(
    "sampler",
    [Sampler(steps=9, order=LeftToRight()), Sampler(steps=9, block_length=2)],
    ids=["left", "blocks"],
)
def test_rows_stop_at_their_end_and_are_the_same_up_to_there(sampler, guidance, batch):
    sampler = replace(sampler, guidance=ClassifierFreeGuidance(guidance))
    full = Rollout.sample(sampler, TinyDenoiser(), batch, generator=rng(1))
    # An id that stands near the beginning of some answer.
    places = batch.target[0].nonzero().flatten()
    stop = int(full.batch.ids[0, places[len(places) // 4 - 1]])
    watched = Watched()
    early = Rollout.sample(replace(sampler, stop_ids=(stop,)), watched, batch, generator=rng(1))
    assert min(watched.rows) < max(watched.rows)
    for row in range(len(batch)):
        before = early.scored[row]
        assert torch.equal(early.batch.ids[row, before], full.batch.ids[row, before])
        torch.testing.assert_close(early.log_prob[row, before], full.log_prob[row, before])
        assert (early.steps[row, before] >= 0).all()
        if early.ended[row]:
            (answer,) = early.answers()[row : row + 1]
            assert int(answer[-1]) == stop
            assert stop not in answer[:-1].tolist()
        open_ = batch.target[row] & (early.steps[row] < 0)
        assert (early.batch.ids[row, open_] == VOCABULARY.eos_id).all()
        assert not (open_ & early.scored[row]).any()
        assert early.ended[row] or not open_.any()
    assert (early.steps < 0)[batch.target].any()
    assert not (early.batch.ids[batch.target] == VOCABULARY.mask_id).any()


def test_rows_that_go_on_keep_their_own_unconditional_twin():
    batch = prompts(2, 7, 0, 4, answer=9)
    sampler = Sampler(steps=9, order=LeftToRight(), guidance=ClassifierFreeGuidance(2.0))
    negative = replace(batch, ids=batch.ids.flip(0).clamp_max(VOCABULARY.text[1] - 1))
    full = Rollout.sample(
        sampler, TinyDenoiser(), batch, generator=rng(), unconditional=(negative,)
    )
    places = batch.target[0].nonzero().flatten()
    stopping = replace(sampler, stop_ids=(int(full.batch.ids[0, places[1]]),))
    watched = Watched()
    early = Rollout.sample(stopping, watched, batch, generator=rng(), unconditional=(negative,))
    assert 0 < min(watched.rows) < max(watched.rows)
    assert torch.equal(early.batch.ids[early.scored], full.batch.ids[early.scored])


def test_all_rows_stopped_end_the_sampling():
    words = [EOS] * 16
    batch, watched = prompts(2, 3, answer=8), factorized(words)
    rollout = Rollout.sample(
        Sampler(steps=8, order=LeftToRight(), stop_ids=(EOS,)), watched, batch, generator=rng()
    )
    assert watched.calls == 1
    assert rollout.lengths.tolist() == [1, 1]


def test_rows_whose_targets_are_filled_take_no_more_part():
    watched = Watched()
    Sampler(steps=9)(watched, ragged(), generator=rng())
    taking_part = [
        int((ragged().target.sum(1) > step).sum()) for step in range(9)
    ]  # a token each step at least
    assert watched.rows == taking_part


# ---- rows of a batch ----------------------------------------------------------------------------


def test_rows_of_a_batch_take_their_features_along():
    batch = with_features()  # 2, 0 and 3 slots
    taken = batch.rows(torch.tensor([2, 0, 2, 1]))
    assert torch.equal(taken.ids, batch.ids[[2, 0, 2, 1]])
    first, third = batch.features[:2], batch.features[2:]
    assert torch.equal(taken.features, torch.cat([third, first, third]))
    rolled = Rollout.sample(
        Sampler(steps=2),
        TinyDenoiser(),
        batch.rows(torch.arange(3).repeat_interleave(2)),
        generator=rng(),
    )
    assert torch.equal(rolled.batch.ids[0::2], rolled.batch.ids[1::2])


def test_rollouts_are_split_into_micro_batches():
    rollout = Rollout.sample(
        Sampler(steps=5, temperature=1.0), TinyDenoiser(), with_features(), generator=rng()
    )
    part = rollout.rows(torch.tensor([2, 0]))
    assert len(part) == 2
    assert torch.equal(part.lengths, rollout.lengths[[2, 0]])
    for mine, whole in zip(part.answers(), [rollout.answers()[i] for i in (2, 0)], strict=True):
        assert torch.equal(mine, whole)
    assert len(part.batch.features) == 5


def test_rows_of_a_batch_take_their_images_along():
    class Image:
        places = None

        def __init__(self, slots: int):
            self.slots = slots

        def map(self, function):
            return self

    images = tuple(Image(n) for n in (1, 1, 3))  # two in the first row, one in the third
    batch = replace(with_features(), features=None, views=images)
    taken = batch.rows(torch.tensor([2, 1, 0]))
    assert taken.views == (images[2], images[0], images[1])
    assert taken.features is None


# ---- statistics ---------------------------------------------------------------------------------


def test_lengths_are_logged_as_trl_does():
    batch = prompts(1, 1, answer=6)
    rollout = Rollout.sample(Sampler(steps=6), TinyDenoiser(), batch, generator=rng())
    places = batch.target[0].nonzero().flatten()
    scored = torch.zeros_like(rollout.scored)
    scored[0, places[:4]] = True
    scored[1, places] = True
    rollout = replace(rollout, scored=scored, ended=torch.tensor([True, False]))
    assert rollout.statistics().values() == {
        "completions/mean_length": 5.0,
        "completions/min_length": 4.0,
        "completions/max_length": 6.0,
        "completions/mean_terminated_length": 4.0,
        "completions/min_terminated_length": 4.0,
        "completions/max_terminated_length": 4.0,
        "completions/clipped_ratio": 0.5,
    }
