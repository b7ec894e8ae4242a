"""A generator for each output: each is what it is alone, whatever stands beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mmdlm.core.diffusion.schedule import Shifted
from mmdlm.core.kernels.linear import PackedLayers
from mmdlm.core.sampling.cache import Dual, Stable
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import Candidates, Entropy, LeftToRight, Margin, Order, Random
from mmdlm.core.sampling.output import SampleOutput
from mmdlm.core.sampling.remasking import Remasking
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import (
    Ancestral,
    CatchUpTransfer,
    EntropyBound,
    PlannedTransfer,
    Threshold,
)
from mmdlm.core.sequence import Batch, Sequence, collate
from mmdlm.experimental.neighbor_noise import IdNeighborhood, NeighborNoise
from tests.core.fakes import VOCABULARY, TinyDenoiser, document, rng
from tests.core.sampling.test_sampler import SAMPLERS
from tests.models.tiny import tiny_model


@dataclass(frozen=True)
class Thrown(Order):
    """An order of one's own, which draws as it likes."""

    def score(self, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        noise = torch.rand(candidates.logits.shape, generator=generator)
        return (candidates.logits + noise).amax(-1)


MORE = [
    Sampler(steps=6, order=Thrown(), temperature=0.5, guidance=ClassifierFreeGuidance(2.0)),
    Sampler(steps=6, order=Random(), unmasking=CatchUpTransfer(), temperature=1.0, block_length=5),
    Sampler(steps=6, order=LeftToRight(), unmasking=PlannedTransfer(Shifted(3.0)), temperature=1.0),
    Sampler(steps=9, order=Entropy(), unmasking=EntropyBound(0.5), temperature=1.0),
    Sampler(steps=9, unmasking=Threshold(0.3, in_order=True, distinct=True), stop_ids=(3, 4)),
    Sampler(
        steps=5, order=Margin(1.0), full_vocabulary=True, allow_mask_token=True, temperature=2.0
    ),
    Sampler(steps=7, remask=Remasking(0.4), noise=NeighborNoise(IdNeighborhood(1))),
    Sampler(
        steps=9,
        order=Random(),
        unmasking=Ancestral(drawn=True),
        guidance=ClassifierFreeGuidance(3.0),
    ),
]
DOCUMENTS = [
    document(5, 8, seed=1, prompt=3),
    document(9, 0, seed=2, prompt=2),
    document(3, 3, seed=3),
    document(2, 8, seed=4, prompt=9),
]


def run(
    sampler: Sampler, documents: list[Sequence], seeds: list[int], **options: Batch
) -> SampleOutput:
    batch = collate(documents, VOCABULARY)
    generators = [rng(seed) for seed in seeds]
    return sampler(TinyDenoiser(scale=0.3), batch, generator=generators, **options)


@pytest.mark.parametrize("sampler", SAMPLERS + MORE, ids=range(len(SAMPLERS + MORE)))
def test_an_output_is_what_it_is_alone(sampler: Sampler) -> None:
    seeds = [5, 6, 5, 7]
    out = run(sampler, DOCUMENTS, seeds)
    for row, (one, seed) in enumerate(zip(DOCUMENTS, seeds, strict=True)):
        alone = sampler(TinyDenoiser(scale=0.3), collate([one], VOCABULARY), generator=rng(seed))
        assert torch.equal(out.ids[row, : len(one)], alone.ids[0])
        assert torch.equal(out.steps[row, : len(one)], alone.steps[0])
    turned = run(sampler, DOCUMENTS[::-1], seeds[::-1])
    assert torch.equal(turned.ids.flip(0), out.ids)


def test_what_stands_against_an_output_may_be_longer() -> None:
    sampler = Sampler(
        steps=7, remask=Remasking(0.5), temperature=1.0, guidance=ClassifierFreeGuidance(2.0)
    )
    against = [document(5, 8, seed=9, prompt=12), document(9, 0, seed=8, prompt=1)]
    some = DOCUMENTS[:2]

    def rows(given: list[Sequence], length: int) -> Batch:
        return collate(given, VOCABULARY, length=length)

    def length(number: int) -> int:
        return max(len(some[number]), len(against[number]))

    out = sampler(
        TinyDenoiser(scale=0.3),
        rows(some, 30),
        generator=[rng(1), rng(2)],
        unconditional=rows(against, 30),
    )
    for number in (0, 1):
        alone = sampler(
            TinyDenoiser(scale=0.3),
            rows([some[number]], length(number)),
            generator=rng(1 + number),
            unconditional=rows([against[number]], length(number)),
        )
        assert torch.equal(out.ids[number, : length(number)], alone.ids[0])


@pytest.mark.parametrize("cache", [None, Dual(), Stable()], ids=str)
def test_the_network_itself_gives_each_what_it_is_alone(cache: Dual | Stable | None) -> None:
    model = tiny_model(vocabulary=VOCABULARY.to_dict(), num_hidden_layers=3)
    sampler = Sampler(
        steps=6,
        temperature=1.0,
        order=Random(),
        cache=cache,
        guidance=ClassifierFreeGuidance(2.0),
        block_length=6,
    )
    batch = collate(DOCUMENTS, VOCABULARY)
    out = sampler(model, batch, generator=[rng(n) for n in range(4)], packed=PackedLayers(model))
    for row, one in enumerate(DOCUMENTS):
        alone = sampler(model, collate([one], VOCABULARY), generator=rng(row))
        assert torch.equal(out.ids[row, : len(one)], alone.ids[0])


def test_outputs_of_one_prompt_differ_by_their_generators_alone() -> None:
    sampler = Sampler(steps=4, temperature=1.0)
    out = run(sampler, [DOCUMENTS[0]] * 3, [1, 2, 1])
    assert torch.equal(out.ids[0], out.ids[2])
    assert not torch.equal(out.ids[0], out.ids[1])


SAME = rng()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (42, "must be a torch.Generator, or a list of one for each output, not 42"),
        (None, "must be a torch.Generator, or a list of one for each output, not None"),
        ([rng(), None], "generator 1 of the list must be a torch.Generator, not None"),
        ([3, rng()], "generator 0 of the list must be a torch.Generator, not 3"),
        ([rng()], "a list of 1 for 2 outputs"),
        ([], "a list of 0 for 2 outputs"),
        ([rng(), rng(), rng()], "a list of 3 for 2 outputs"),
        ([SAME, SAME], "the same torch.Generator more than once"),
    ],
)
def test_what_is_no_generator_is_refused(given: object, message: str) -> None:
    batch = collate(DOCUMENTS[:2], VOCABULARY)
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampler(steps=2)(TinyDenoiser(scale=0.3), batch, generator=given)  # type: ignore[arg-type]


def test_a_single_generator_draws_for_all() -> None:
    sampler = replace(SAMPLERS[8], steps=5)
    batch = collate([DOCUMENTS[0]], VOCABULARY)
    one = sampler(TinyDenoiser(scale=0.3), batch, generator=rng(3))
    assert torch.equal(one.ids, sampler(TinyDenoiser(scale=0.3), batch, generator=[rng(3)]).ids)
