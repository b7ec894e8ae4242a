"""Rows that join and leave between steps: each is filled as it is alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmdlm.core.sampling.cache import Dual
from mmdlm.core.sampling.denoising import Denoising, forward
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import Random
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import Sequence, collate
from tests.core.fakes import VOCABULARY, TinyDenoiser, document, rng, with_features
from tests.core.sampling.test_generators import MORE
from tests.core.sampling.test_sampler import SAMPLERS
from tests.models.tiny import tiny_model

ALL = [one for one in SAMPLERS + MORE if one.cache is None]
DENOISER = TinyDenoiser(scale=0.3)


def some_document(chance: random.Random) -> Sequence:
    text, codes = chance.randint(1, 9), chance.choice([0, 3, 8])
    return document(text, codes, seed=chance.randrange(99), prompt=chance.randint(0, 12))


def begun(sampler: Sampler, one: Sequence, seed: int) -> Denoising:
    return sampler.begin(DENOISER, collate([one], VOCABULARY), generator=[rng(seed)])


def mixed(chance: random.Random, requests: list[tuple[Sampler, Sequence, int]]) -> list[Tensor]:
    """Fill all requests, which come and are put together at random times; some are given up."""
    ids: dict[int, Tensor] = {}
    groups: list[tuple[Denoising, list[int]]] = []
    waiting = list(range(len(requests)))
    while waiting or groups:
        for _ in range(chance.randint(0 if groups else 1, 2)):
            if waiting:
                number = waiting.pop(0)
                groups.append((begun(*requests[number]), [number]))
        together: list[tuple[Denoising, list[int]]] = []
        for one, numbers in groups:
            place = next((i for i, (other, _) in enumerate(together) if other.joins(one)), None)
            if place is None or chance.random() < 0.2:
                together.append((one, numbers))
            else:
                other, others = together[place]
                together[place] = Denoising.joined([other, one]), others + numbers
        states = forward([one for one, _ in together])
        groups = []
        for (one, numbers), hidden in zip(together, states, strict=True):
            one = one.after(hidden)
            going_on = one.plan.host.unfinished.tolist()
            for row, number in enumerate(numbers):
                if not going_on[row]:
                    ids[number] = one.output().ids[row, : len(requests[number][1])]
            kept = [row for row, is_left in enumerate(going_on) if is_left]
            kept = [row for row in kept if chance.random() > 0.02]  # a client leaves
            if len(kept) == len(numbers):
                groups.append((one, numbers))
            elif kept:
                groups.append((one.rows(kept), [numbers[row] for row in kept]))
    return [ids.get(number, torch.empty(0)) for number in range(len(requests))]


def check_mixture(seed: int) -> None:
    chance = random.Random(seed)
    samplers = chance.sample(ALL, 3)
    requests = [
        (chance.choice(samplers), some_document(chance), chance.randrange(99)) for _ in range(6)
    ]
    found = mixed(chance, requests)
    assert sum(map(len, found))
    for (sampler, one, number), ids in zip(requests, found, strict=True):
        alone = sampler(DENOISER, collate([one], VOCABULARY), generator=rng(number))
        assert not len(ids) or torch.equal(ids, alone.ids[0])


@pytest.mark.parametrize("seed", range(4))
def test_a_mixture_changes_nothing(seed: int) -> None:
    check_mixture(seed)


@pytest.mark.slow
def test_200_mixtures_change_nothing() -> None:
    for seed in range(4, 200):
        check_mixture(seed)


def test_the_network_gives_each_what_it_is_alone() -> None:
    model = tiny_model(vocabulary=VOCABULARY.to_dict(), num_hidden_layers=3)
    first = Sampler(steps=6, temperature=1.0, order=Random(), block_length=6)
    second = replace(first, steps=9, guidance=ClassifierFreeGuidance(2.0))
    documents = [document(5, 8, seed=1, prompt=3), document(9, 0, seed=2), document(2, 3, seed=3)]
    requests = [(first, documents[0]), (second, documents[1]), (first, documents[2])]
    groups = [
        sampler.begin(model, collate([one], VOCABULARY), generator=[rng(number)])
        for number, (sampler, one) in enumerate(requests)
    ]
    pair = Denoising.joined([groups[0], groups[2]])
    single = groups[1]
    calls: list[int] = []
    steps = 0
    model.model.register_forward_hook(lambda *_: calls.append(1))
    while not (pair.plan.host.is_finished and single.plan.host.is_finished):
        steps += 1
        going_on = [one for one in (pair, single) if not one.plan.host.is_finished]
        after = iter([o.after(h) for o, h in zip(going_on, forward(going_on), strict=True)])
        pair, single = (one if one.plan.host.is_finished else next(after) for one in (pair, single))
    assert len(calls) == steps > 6, "each step of both groups is one pass"
    ids = [pair.state.x_t[0], single.state.x_t[0], pair.state.x_t[1]]
    for number, (sampler, one) in enumerate(requests):
        alone = sampler(model, collate([one], VOCABULARY), generator=rng(number))
        assert torch.equal(ids[number][: len(one)], alone.ids[0])


def test_rows_take_their_features_along() -> None:
    sampler, batch = Sampler(steps=4), with_features()
    rows = sampler.begin(DENOISER, batch, generator=[rng(0), rng(1), rng(2)])
    other = sampler.begin(DENOISER, batch.rows(torch.tensor([2])), generator=[rng(2)])
    joined = Denoising.joined([rows.rows([2, 1]), other])
    alone = sampler(DENOISER, batch, generator=rng()).ids
    while not joined.plan.host.is_finished:
        joined = joined.after(forward([joined])[0])
    for row, number in enumerate([2, 1, 2]):
        length = joined.run.generators.lengths[row]
        assert torch.equal(joined.state.x_t[row, :length], alone[number, :length])


def test_rows_that_draw_from_one_generator_or_cache_stay_by_themselves() -> None:
    one = collate([document(5, 0)], VOCABULARY)
    own = Sampler(steps=2).begin(DENOISER, one, generator=[rng()])
    shared = Sampler(steps=2).begin(DENOISER, one, generator=rng())
    assert own.joins(own)
    assert not own.joins(shared)
    model = tiny_model(vocabulary=VOCABULARY.to_dict())
    cached = Sampler(steps=2, cache=Dual()).begin(model, one, generator=[rng()])
    assert not cached.joins(cached)
    assert not own.joins(Sampler(steps=3).begin(DENOISER, one, generator=[rng()]))
