"""Noise that drifts to similar tokens (D3PM): walks over ids, bits or embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.diffusion.forward import TokenNoising
from mmdlm.core.diffusion.noise import Noise
from mmdlm.core.host_masks import numbers_of, on_host, sent
from mmdlm.core.vocabulary import GENERATED, Vocabulary
from mmdlm.experimental.uniform import UniformNoise


class Neighborhood(ABC):
    """A symmetric random walk over codes 0 .. size - 1, so that all stay equally likely."""

    @abstractmethod
    def step(self, codes: Tensor, size: int, *, generator: torch.Generator) -> Tensor:
        """One step from each of `codes`, any shape; a walk may stay where it is.

        The result is cast to int64.
        """


@dataclass(frozen=True)
class IdNeighborhood(Neighborhood):
    """Near ids are similar tokens, as gray levels are: a step to one of `radius` ids on each side.

    Steps that leave the range are not taken. Source: arXiv:2107.03006, section 3.1 (ordinal data).
    """

    radius: int = 1

    def step(self, codes: Tensor, size: int, *, generator: torch.Generator) -> Tensor:
        distance = 1 + _integers(codes, self.radius, generator)
        moved = codes + torch.where(_integers(codes, 2, generator) == 0, distance, -distance)
        return torch.where((moved >= 0) & (moved < size), moved, codes)


@dataclass(frozen=True)
class BitNeighborhood(Neighborhood):
    """Codes that differ in one bit are similar, as those of a look-up-free tokenizer are."""

    def step(self, codes: Tensor, size: int, *, generator: torch.Generator) -> Tensor:
        bits = size.bit_length() - 1
        if size != 1 << bits:
            raise ValueError(
                f"BitNeighborhood: {size} ids are not a power of two; use it for the codes of a "
                "look-up-free image tokenizer"
            )
        return codes ^ (1 << _integers(codes, bits, generator))


@dataclass(frozen=True, eq=False)
class EmbeddingNeighborhood(Neighborhood):
    """Tokens with near embeddings are similar: a step to a mutual k-nearest neighbor.

    Attributes:
        neighbors: [K, k] int64; where a token has fewer than k mutual neighbors, itself.

    Source: arXiv:2107.03006, section 3.1 (token embedding distance). There one direction is enough;
    here both must agree, which bounds a token's neighbors by k and so keeps hubs from slowing all
    others down. Tokens without neighbors move only by `NeighborNoise.uniform`.
    """

    neighbors: Tensor

    @classmethod
    def of(cls, embedding: Tensor, *, k: int = 8) -> EmbeddingNeighborhood:
        """Neighbors by Euclidean distance of the rows of an embedding or codebook [K, D]."""
        size = len(embedding)
        if not 1 <= k < size:
            raise ValueError(f"EmbeddingNeighborhood: k must lie in 1 .. {size - 1}, got {k}")
        own = torch.arange(size, device=embedding.device)
        nearest = []
        for rows in own.split(1024):  # [1024, K] distances at a time
            distance = torch.cdist(embedding[rows].float(), embedding.float())
            distance[own[: len(rows)], rows] = torch.inf
            nearest.append(distance.topk(k, largest=False).indices)
        near = torch.cat(nearest)  # [K, k]
        mutual = (near[near] == own[:, None, None]).any(-1)  # [K, k]
        return cls(neighbors=torch.where(mutual, near, own[:, None]))

    def step(self, codes: Tensor, size: int, *, generator: torch.Generator) -> Tensor:
        if size != len(self.neighbors):
            raise ValueError(
                f"EmbeddingNeighborhood: made from {len(self.neighbors)} embeddings, used for "
                f"{size} ids; build it from the embedding of the same range"
            )
        neighbors = self.neighbors.to(codes.device)
        choice = _integers(codes, neighbors.shape[1], generator)
        return neighbors[codes].gather(-1, choice[..., None]).squeeze(-1)


@dataclass(frozen=True)
class NeighborNoise(Noise):
    """A walk from x_0 through similar tokens, now and then restarted anywhere.

    Steps arrive at rate 1 - `uniform` and restarts at rate `uniform` during a time sigma = -log
    alpha, so that nothing has happened to a share alpha = 1 - p_mask of the tokens. A token drifts
    to its neighbors first and is forgotten in the end: at p_mask = 1 all ids are equally likely.
    This is D3PM's exp(sigma R) with R = (1 - uniform) (P - 1) + uniform (1/K - 1), P a step of the
    walk; it is drawn exactly, without any K x K matrix.

    Attributes:
        neighborhood: What is similar in the range of a position's modality.
        uniform: Share of restarts, in (0, 1]; 1 is `UniformNoise`.

    Source: arXiv:2107.03006, section 3.1; the restarts are ours: without them p_mask would have to
    tend to 1 long before the walk has mixed.
    """

    neighborhood: Neighborhood = IdNeighborhood()
    uniform: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.uniform <= 1:
            raise ValueError(f"NeighborNoise: uniform must lie in (0, 1], got {self.uniform}")

    def fill(
        self,
        x_0: Tensor,
        where: Tensor,
        *,
        p_mask: Tensor,
        modality: Tensor,
        vocabulary: Vocabulary,
        generator: torch.Generator,
    ) -> Tensor:
        restarted, steps = self._events(p_mask.expand(x_0.shape), generator)
        anywhere = UniformNoise().fill(
            x_0,
            where & restarted,
            p_mask=p_mask,
            modality=modality,
            vocabulary=vocabulary,
            generator=generator,
        )
        walks = where & ~restarted
        asked = on_host(torch.stack([walks.long(), steps, modality]))  # all that the host must know
        x_t = anywhere.flatten()
        for kind in GENERATED:
            start, stop = vocabulary.range(kind)
            number = numbers_of(asked[0].bool() & (asked[2] == kind))
            index, longest = sent(number, x_0.device), asked[1].flatten()[number].numpy()
            codes, left = x_0.flatten()[index] - start, steps.flatten()[index]
            for done in range(int(longest.max()) if len(longest) else 0):
                moved = self.neighborhood.step(codes, stop - start, generator=generator)
                codes = torch.where(left > done, moved.to(codes.dtype), codes)
            x_t = x_t.index_copy(0, index, codes + start)
        return x_t.view_as(anywhere)

    def _events(self, p_mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Whether a noised token was restarted, and how many steps it took if it was not; [B, L].

        Both are conditioned on something having happened. A walk restarted is anywhere, whatever
        came before or after.
        """
        p_mask = p_mask.double().clamp(torch.finfo(torch.float32).tiny, 1.0)
        sigma = -torch.log1p(-p_mask)
        u, v = torch.rand(
            (2, *p_mask.shape), generator=generator, device=p_mask.device, dtype=torch.float64
        )
        restarted = u < -torch.expm1(-self.uniform * sigma) / p_mask
        expected = ((1 - self.uniform) * sigma).nan_to_num(posinf=0.0)  # at p_mask = 1 all restart
        first = -torch.log1p(
            v * torch.expm1(-expected)
        )  # arrival of the first step, before the end
        steps = 1 + torch.poisson((expected - first).clamp_min(0.0), generator=generator)
        return restarted, steps.long()


def _integers(like: Tensor, stop: int, generator: torch.Generator) -> Tensor:
    """Integers 0 .. stop - 1 of the shape of `like`."""
    return torch.randint(stop, like.shape, generator=generator, device=like.device)


@dataclass(frozen=True)
class TokenNeighbor(TokenNoising):
    """Noised tokens drift to similar ones first and are forgotten in the end (`NeighborNoise`).

    Sample from a model of it with the same noise. Source: arXiv:2107.03006, section 3.1.
    """

    neighborhood: Neighborhood = IdNeighborhood()
    uniform: float = 0.25

    @property
    def noise(self) -> Noise:
        return NeighborNoise(self.neighborhood, uniform=self.uniform)
