"""Noise stays in its range, and the neighbor walk is the matrix exponential it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmdlm.core.diffusion.noise import MaskNoise, Noise
from mmdlm.core.vocabulary import Modality
from mmdlm.experimental.neighbor_noise import (
    BitNeighborhood,
    EmbeddingNeighborhood,
    IdNeighborhood,
    Neighborhood,
    NeighborNoise,
)
from mmdlm.experimental.uniform import UniformNoise
from tests.core.fakes import CODES, VOCABULARY, ragged, rng

NEIGHBORHOODS = [
    IdNeighborhood(),
    IdNeighborhood(radius=3),
    BitNeighborhood(),
    EmbeddingNeighborhood.of(torch.randn(CODES, 2, generator=rng(5)), k=3),
]


def transitions(neighborhood: Neighborhood) -> Tensor:
    """[K, K] step probabilities, estimated from many steps."""
    codes = torch.arange(CODES).repeat(40_000)
    moved = neighborhood.step(codes, CODES, generator=rng())
    counts = torch.zeros(CODES, CODES).index_put((codes, moved), torch.tensor(1.0), accumulate=True)
    return counts / counts.sum(1, keepdim=True)


@pytest.mark.parametrize("neighborhood", NEIGHBORHOODS, ids=lambda n: type(n).__name__)
def test_steps_are_symmetric(neighborhood: Neighborhood):
    p = transitions(neighborhood)
    torch.testing.assert_close(p, p.T, atol=0.02, rtol=0)


def test_embedding_neighbors_are_near_and_mutual():
    embedding = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [9.0]])
    neighbors = EmbeddingNeighborhood.of(embedding, k=1).neighbors
    assert neighbors[:, 0].tolist() == [1, 0, 2, 4, 3, 5]  # 2 and 5 have no mutual neighbor
    p = EmbeddingNeighborhood.of(torch.randn(50, 3, generator=rng()), k=4).neighbors
    for own, row in enumerate(p.tolist()):
        assert all(other == own or own in p[other] for other in row)


@pytest.mark.parametrize("p_mask", [0.2, 0.7, 0.99, 1.0])
def test_the_walk_is_the_matrix_exponential(p_mask: float):
    """Given that something happened, x_t is distributed as (exp(sigma R) - alpha) / p_mask."""
    uniform, x_0, n = 0.3, 2, 100_000
    noise = NeighborNoise(IdNeighborhood(), uniform=uniform)
    x_t = noise.fill(
        torch.full((1, n), VOCABULARY.image[0] + x_0),
        torch.ones(1, n, dtype=torch.bool),
        p_mask=torch.full((1, n), p_mask),
        modality=torch.full((1, n), int(Modality.IMAGE)),
        vocabulary=VOCABULARY,
        generator=rng(),
    )
    drawn = torch.bincount(x_t[0] - VOCABULARY.image[0], minlength=CODES) / n

    step = torch.zeros(CODES, CODES, dtype=torch.float64)
    for i in range(CODES):
        step[i, max(i - 1, 0)] += 0.5
        step[i, min(i + 1, CODES - 1)] += 0.5
    one = torch.eye(CODES, dtype=torch.float64)
    rate = (1 - uniform) * (step - one) + uniform * (1 / CODES - one)
    sigma = -math.log(1 - p_mask) if p_mask < 1 else 100.0
    expected = ((sigma * rate).matrix_exp() - (1 - p_mask) * one) / p_mask
    torch.testing.assert_close(drawn.double(), expected[x_0], atol=6e-3, rtol=0)


@pytest.mark.parametrize(
    "noise", [MaskNoise(), UniformNoise(), NeighborNoise(), NeighborNoise(uniform=1.0)], ids=str
)
def test_noise_stays_in_place_and_in_range(noise: Noise):
    batch = ragged()
    x_t = noise.fill(
        batch.ids,
        batch.target,
        p_mask=torch.rand(batch.ids.shape, generator=rng()),
        modality=batch.modality,
        vocabulary=VOCABULARY,
        generator=rng(),
    )
    assert torch.equal(x_t[~batch.target], batch.ids[~batch.target])
    if noise == MaskNoise():
        assert (x_t[batch.target] == VOCABULARY.mask_id).all()
        return
    for modality in (Modality.TEXT, Modality.IMAGE):
        start, stop = VOCABULARY.range(modality)
        drawn = x_t[batch.target & batch.of(modality)]
        assert ((drawn >= start) & (drawn < stop)).all()


def test_placeholders_outside_the_range_do_no_harm():
    """A sampler starts from batches whose targets hold anything."""
    ids = torch.full((2, 50), VOCABULARY.mask_id)
    for modality in (Modality.TEXT, Modality.IMAGE):
        x_t = NeighborNoise().fill(
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            p_mask=torch.ones(ids.shape),
            modality=torch.full_like(ids, int(modality)),
            vocabulary=VOCABULARY,
            generator=rng(),
        )
        start, stop = VOCABULARY.range(modality)
        assert ((x_t >= start) & (x_t < stop)).all()


def test_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="uniform"):
        NeighborNoise(uniform=0.0)
    with pytest.raises(ValueError, match="11 ids are not a power of two"):
        BitNeighborhood().step(torch.tensor([1]), 11, generator=rng())
    with pytest.raises(ValueError, match="8 embeddings, used for 11 ids"):
        NEIGHBORHOODS[3].step(torch.tensor([1]), 11, generator=rng())
    with pytest.raises(ValueError, match="k must lie"):
        EmbeddingNeighborhood.of(torch.randn(4, 2), k=4)
