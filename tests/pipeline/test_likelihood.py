"""`Model.loglikelihood`: within its standard error of enumeration, whatever stands beside it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from mmdlm import load
from mmdlm.core.likelihood.elbo import Elbo
from mmdlm.core.likelihood.enumeration import EnumeratedElbo
from mmdlm.core.likelihood.greedy import is_greedy
from mmdlm.core.likelihood.mean_field import OneStepMeanField
from mmdlm.core.likelihood.token_scores import token_log_prob
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import Sequence, collate
from mmdlm.pipeline.model import Model
from mmdlm.templates.chat_template import PLAIN

WORDS = ["red", "heart", "woman", "dark", "skin", "tone", "light"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return load(tiny_checkpoint, device="cpu")


def pairs(count: int) -> list[tuple[str, str]]:
    """Contexts of nothing to three words, continuations of one to nine."""
    draw = rng(3)

    def some(least: int, most: int) -> str:
        number = int(torch.randint(least, most + 1, (), generator=draw))
        return " ".join(
            WORDS[int(torch.randint(len(WORDS), (), generator=draw))] for _ in range(number)
        )

    return [(some(0, 3), f" {some(1, 9)}") for _ in range(count)]


@torch.no_grad()
def enumerated(model: Model, document: Sequence) -> float:
    """The bound by its definition: the mean over sizes k, and over the sets of each size."""
    denoiser = model.denoiser
    batch = collate([document], denoiser.vocabulary)
    places = batch.target[0].nonzero()[:, 0].tolist()
    total = 0.0
    for k in range(1, len(places) + 1):
        sets = list(combinations(places, k))
        where = torch.zeros(len(sets), batch.ids.shape[1], dtype=torch.bool)
        for row, chosen in enumerate(sets):
            where[row, list(chosen)] = True
        rows = batch.rows(torch.zeros(len(sets), dtype=torch.int64))
        x_t = rows.ids.masked_fill(where, denoiser.vocabulary.mask_id)
        found = token_log_prob(denoiser, x_t, rows, where=where).double()
        total += float(found.sum(1).mean()) * len(places) / k
    return total / len(places)


@pytest.mark.slow
def test_twenty_of_twenty_lie_within_two_standard_errors_of_the_enumerated_bound(
    model: Model,
) -> None:
    asked = pairs(20)
    scores = model.loglikelihood(asked, batch_size=64)
    exact = [enumerated(model, model._scored_document(*pair)) for pair in asked]
    assert {score.tokens for score in scores} >= {1, 3, 6, 8}
    assert any(score.standard_error for score in scores)  # not all of them are enumerated here too
    for score, value in zip(scores, exact, strict=True):
        assert score.standard_error == 0 or score.tokens > 7
        assert abs(score.value - value) <= 2 * score.standard_error + 1e-4


@pytest.mark.slow
def test_the_standard_error_is_that_of_the_estimate(model: Model) -> None:
    """Over many draws the deviation is as large as it says: neither too sure nor too modest."""
    pair = ("woman", " dark skin tone red heart woman")
    exact = enumerated(model, model._scored_document(*pair))
    scores = model.loglikelihood(
        [pair] * 60, samples=16, batch_size=256, generator=[rng(n) for n in range(60)]
    )
    deviation = torch.tensor([score.value - exact for score in scores])
    error = torch.tensor([score.standard_error for score in scores])
    assert 0.8 < float(error.square().mean().sqrt() / deviation.square().mean().sqrt()) < 1.25
    assert abs(float(deviation.mean())) < 3 * float(deviation.std()) / math.sqrt(60)


def test_a_pair_is_scored_alike_in_any_company(model: Model) -> None:
    asked = pairs(6)
    together = model.loglikelihood(asked, samples=16, batch_size=16)
    backwards = model.loglikelihood(asked[::-1], samples=16, batch_size=3)[::-1]
    (alone,) = model.loglikelihood(asked[4:5], samples=16, batch_size=1)
    for one, other in zip(together, [*backwards[:4], alone, *backwards[5:]], strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-4)
        assert one.standard_error == pytest.approx(other.standard_error, abs=1e-4)
        assert (one.tokens, one.is_greedy) == (other.tokens, other.is_greedy)


def test_the_elbo_of_core_is_what_it_averages(model: Model) -> None:
    pair = ("woman", " dark skin tone red heart woman")
    estimator = Elbo(repeats=2, strata=4)
    draws = rng(int(torch.randint(2**63 - 1, (), generator=rng(7))))
    batch = collate([model._scored_document(*pair)], model.denoiser.vocabulary)
    with torch.no_grad():
        values = [
            float(estimator.log_prob(model.denoiser, batch, views).sum())
            for _ in range(2)
            for views in estimator.draw(batch, model.denoiser.vocabulary, generator=draws)
        ]
    (score,) = model.loglikelihood([pair], estimator=estimator, samples=16, generator=rng(7))
    assert score.value == pytest.approx(sum(values) / 2, rel=1e-5)
    assert score.standard_error == pytest.approx(abs(values[0] - values[1]) / 2, rel=1e-3)


def test_equal_copies_are_computed_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    hidden = type(model.denoiser).hidden

    def counted(self, x_t, batch, **options):
        rows.append(len(x_t))
        return hidden(self, x_t, batch, **options)

    monkeypatch.setattr(type(model.denoiser), "hidden", counted)
    (one,) = model.loglikelihood([("red", " heart")], estimator=OneStepMeanField(0.0))
    assert one.standard_error == 0
    assert rows[0] == 1
    assert rows[1:] == [1] * len(rows[1:])  # of the greedy steps
    rows.clear()
    model.loglikelihood([(word, " heart") for word in WORDS[:4]], batch_size=12)
    assert rows[0] == 4 * EnumeratedElbo.count(one.tokens)
    rows.clear()
    answers = [("red", f" {word}") for word in ("heart", "woman", "skin")]
    together = model.loglikelihood(answers, batch_size=12)
    assert {score.tokens for score in together} == {1}
    assert rows == [1, 1]  # one masked token for all answers; once more for what is greedy
    assert together == [score for pair in answers for score in model.loglikelihood([pair])]


def test_greedy_is_what_the_sampler_writes(model: Model) -> None:
    """For what the sampler wrote, and for the same with one token changed."""
    document = model._scored_document("woman", " dark skin tone")
    batch = collate([document], model.denoiser.vocabulary)
    steps = int(batch.target.sum())
    ids = Sampler(steps=steps)(model.denoiser, batch, generator=rng()).ids[0]
    written = replace(batch, ids=ids[None])
    changed = []
    for place in batch.target[0].nonzero()[:, 0].tolist():
        other = ids.clone()
        other[place] = (other[place] + 1) % model.denoiser.vocabulary.text[1]
        changed.append(replace(batch, ids=other[None]))
    assert is_greedy(model.denoiser, written).tolist() == [True]
    assert [is_greedy(model.denoiser, one).item() for one in changed] == [False] * steps


def test_the_tokens_are_those_of_the_whole_text(model: Model) -> None:
    codec = model.codec
    for context, continuation in (("woman dark", " skin"), ("woman dark ", "skin"), ("", "skin")):
        document = model._scored_document(context, continuation)
        ids = [int(i) for part in document.segments for i in part.ids[part.target]]
        whole = codec.encode(context + continuation)
        assert ids == whole[len(codec.encode(context.rstrip())) :]


def test_messages_are_a_context(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, device="cpu")
    model.text_tokenizer.chat_template = PLAIN
    (score,) = model.loglikelihood([([{"role": "user", "content": "red"}], "heart")])
    assert score.value < 0
    assert score.tokens == len(model.codec.encode("heart"))


@pytest.mark.parametrize(
    "pair, options, message",
    [
        (("red", ""), {}, "continuation '' has no tokens"),
        (("red", " heart " * 100), {}, "shorten it|room for"),
        (("red", " heart"), {"samples": 1}, "samples must be a whole number of at least 2, got 1"),
        (("red", " heart"), {"batch_size": 0}, "batch_size must be .* at least 1, got 0"),
        ("red", {}, "'red' is no pair; give \\(context, continuation\\)"),
        (([{"role": "user", "content": "red"}], " heart"), {}, "no chat template"),
    ],
)
def test_what_cannot_be_scored_is_refused(model: Model, pair, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.loglikelihood([pair], **options)
