"""The forward process: from clean tokens x_0 to noisy tokens x_t, only at target positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmdlm.core.diffusion.noise import MaskNoise, Noise
from mmdlm.core.diffusion.schedule import MaskSchedule
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Modality, Vocabulary


@dataclass(frozen=True)
class Corruption:
    """x_t and what a loss needs to know about it; all [B, L].

    Attributes:
        x_t: int64, noisy ids; equal to the clean ids wherever nothing was noised.
        is_noised: bool, positions whose token was noised.
        loss_mask: bool, positions that the loss covers: those, or all targets.
        t: Time in [0, 1] of each position.
        p_mask: Share of noised targets at that time: the probability, or the exact share.
        slope: p_mask'(t), the rate at which tokens are noised at that time.
        weight: slope / p_mask, the factor of a covered token's cross-entropy in the bound.
        block: int64, number of the block of each token (`Batch.block`); None: not drawn with it.
    """

    x_t: Tensor
    is_noised: Tensor
    loss_mask: Tensor
    t: Tensor
    p_mask: Tensor
    slope: Tensor
    weight: Tensor
    block: Tensor | None = None


class ForwardProcess(ABC):
    """q(x_t | x_0), independent from token to token given the time."""

    def of(self, modality: Modality) -> ForwardProcess:
        """Return the process that noises tokens of a modality."""
        return self

    def rates(self, t: Tensor, vocabulary: Vocabulary, *, ids: tuple[int, int]) -> Tensor | None:
        """Weights that tokens of `ids` would have at times [M] -> [M, R]; None: all the same."""
        return None

    @abstractmethod
    def corrupt(
        self, batch: Batch, t: Tensor, vocabulary: Vocabulary, *, generator: torch.Generator
    ) -> Corruption:
        """Noise the targets of a batch at times t, [B] (one a row) or [B, L]."""

    @abstractmethod
    def complement(
        self,
        batch: Batch,
        corruption: Corruption,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
    ) -> Corruption:
        """Noise exactly the targets that `corruption` left clean.

        Between the two every target is covered once. The weight is p_mask'(t) / (1 - p_mask): for a
        schedule that is linear, the bound's own weight at 1 - t. So both copies estimate the bound.

        A schedule that begins with p_mask(0) = eps above 0 bounds the weights of the first copy;
        those of the second are bounded alike, by p_mask'(t) / eps. It biases them: of the bound of
        a model whose tokens do not depend on each other the first copy has 1 - eps under
        `Linear(eps)`, the second 1 - 3/2 eps.

        With `exact_count`, k of n targets leave n - k; where k = n all are noised once more, so
        that the second copy's count is uniform on 1 .. n as the first one's is.

        Source: arXiv:2505.16839, section 2.3 (complementary masking), which leaves the weight out.
        """


class FillingProcess(ForwardProcess):
    """What is noised becomes `noise`."""

    @property
    @abstractmethod
    def noise(self) -> Noise:
        """What a noised token becomes."""

    def complement(
        self,
        batch: Batch,
        corruption: Corruption,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
    ) -> Corruption:
        is_noised, share = self._left(batch, corruption)
        least = max(self._least_share, torch.finfo(share.dtype).tiny)
        return Corruption(
            x_t=self._fill(batch, is_noised, share, vocabulary, generator),
            is_noised=is_noised,
            loss_mask=is_noised,
            t=corruption.t,
            p_mask=share,
            slope=corruption.slope,
            weight=corruption.slope / share.clamp_min(least),
        )

    @property
    def _least_share(self) -> float:
        """The share that targets of a complement are counted as, where it is smaller."""
        return 0.0

    def _left(self, batch: Batch, corruption: Corruption) -> tuple[Tensor, Tensor]:
        """[B, L] the targets that a complement noises, and their share."""
        return batch.target & ~corruption.is_noised, 1 - corruption.p_mask

    def _fill(
        self,
        batch: Batch,
        is_noised: Tensor,
        p_mask: Tensor,
        vocabulary: Vocabulary,
        generator: torch.Generator,
    ) -> Tensor:
        return self.noise.fill(
            batch.ids,
            is_noised,
            p_mask=p_mask,
            modality=batch.modality,
            vocabulary=vocabulary,
            generator=generator,
        )


@dataclass(frozen=True)
class TokenNoising(FillingProcess):
    """Choose which targets to noise, then fill them with noise.

    By default each target is noised with probability p_mask(t), independently (LLaDA's text).

    With `exact_count` a random subset of fixed size is: k of the n targets that belong to the same
    document and modality and share a time. `rounding` "up" takes k = ceil(n p_mask), which makes k
    uniform on 1..n when p_mask is uniform, so that the weight p_mask'(t) n / k gives the bound
    exactly (arXiv:2502.09992, appendix A.2). "nearest" takes k = max(1, round(n p_mask)), as
    MaskGIT and MMaDA do: 1 comes more often, n less often, and it is not the bound.
    """

    schedule: MaskSchedule
    exact_count: bool = False
    rounding: Literal["up", "nearest"] = "up"

    def corrupt(
        self, batch: Batch, t: Tensor, vocabulary: Vocabulary, *, generator: torch.Generator
    ) -> Corruption:
        t = per_token(t, batch)
        p_mask, slope = self.schedule.p_mask(t), self.schedule.slope(t)  # [B, L]
        draw = torch.rand(t.shape, generator=generator, device=t.device)
        if self.exact_count:
            is_noised, share = exact_count(
                batch.target,
                p_mask,
                draw,
                group=_document_and_modality(batch),
                t=t,
                nearest=self.rounding == "nearest",
            )
            weight = slope / share.clamp_min(torch.finfo(share.dtype).tiny)
        else:
            is_noised, share = batch.target & (draw < p_mask), p_mask
            weight = self.schedule.weight(t)
        x_t = self._fill(batch, is_noised, share, vocabulary, generator)
        return Corruption(
            x_t=x_t,
            is_noised=is_noised,
            loss_mask=is_noised,
            t=t,
            p_mask=share,
            slope=slope,
            weight=weight,
        )

    @property
    def _least_share(self) -> float:
        return float(self.schedule.p_mask(torch.zeros(())))

    def _left(self, batch: Batch, corruption: Corruption) -> tuple[Tensor, Tensor]:
        is_noised, share = super()._left(batch, corruption)
        if not self.exact_count:
            return is_noised, share
        none = share <= 0  # k = n
        return is_noised | (batch.target & none), share.masked_fill(none, 1.0)


@dataclass(frozen=True)
class Absorbing(TokenNoising):
    """Noised tokens become the mask token. Source: arXiv:2107.03006, section 3.1 (absorbing)."""

    @property
    def noise(self) -> Noise:
        return MaskNoise()


@dataclass(frozen=True)
class PerModality(ForwardProcess):
    """A process for text and another for image codes, so that each keeps its published schedule."""

    text: ForwardProcess
    image: ForwardProcess

    def of(self, modality: Modality) -> ForwardProcess:
        return self.image if modality == Modality.IMAGE else self.text

    def corrupt(
        self, batch: Batch, t: Tensor, vocabulary: Vocabulary, *, generator: torch.Generator
    ) -> Corruption:
        text = self.text.corrupt(batch.only(Modality.TEXT), t, vocabulary, generator=generator)
        image = self.image.corrupt(batch.only(Modality.IMAGE), t, vocabulary, generator=generator)
        return _merge(text, image, batch)

    def complement(
        self,
        batch: Batch,
        corruption: Corruption,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
    ) -> Corruption:
        text, image = (
            process.complement(batch.only(modality), corruption, vocabulary, generator=generator)
            for process, modality in ((self.text, Modality.TEXT), (self.image, Modality.IMAGE))
        )
        return _merge(text, image, batch)


def _merge(text: Corruption, image: Corruption, batch: Batch) -> Corruption:
    """Return the image corruption at image positions, the text corruption everywhere else."""
    is_image = batch.of(Modality.IMAGE)
    return Corruption(
        x_t=torch.where(is_image, image.x_t, text.x_t),
        is_noised=torch.where(is_image, image.is_noised, text.is_noised),
        loss_mask=torch.where(is_image, image.loss_mask, text.loss_mask),
        t=torch.where(is_image, image.t, text.t),
        p_mask=torch.where(is_image, image.p_mask, text.p_mask),
        slope=torch.where(is_image, image.slope, text.slope),
        weight=torch.where(is_image, image.weight, text.weight),
    )


def per_token(t: Tensor, batch: Batch) -> Tensor:
    """Give each token its time: [B] or [B, L] -> [B, L]."""
    if t.shape == batch.ids.shape:
        return t
    if t.shape == batch.ids.shape[:1]:
        return t[:, None].expand(batch.ids.shape)
    raise ValueError(
        f"corrupt: times of shape {tuple(t.shape)} do not fit a batch of {tuple(batch.ids.shape)}; "
        "give one a row or one a token"
    )


def _document_and_modality(batch: Batch) -> Tensor:
    """[B, L] a number for each document and modality of the batch."""
    row = torch.arange(len(batch), device=batch.ids.device)[:, None]
    return (row * batch.ids.shape[1] + batch.document) * len(Modality) + batch.modality


def exact_count(
    target: Tensor, p_mask: Tensor, draw: Tensor, *, group: Tensor, t: Tensor, nearest: bool = False
) -> tuple[Tensor, Tensor]:
    """Choose k of the n targets in each group that share a time t; all [B, L].

    One sort puts the groups side by side, each in random order; the first k of a group are chosen.

    Args:
        target: Bool, the positions to choose from.
        p_mask: Probability that a target is masked at its time.
        draw: U(0, 1), the order in which the targets of a group are chosen.
        group: int64, not negative at targets.
        t: Time of each position, in [0, 1].
        nearest: k = max(1, round(n p_mask)) instead of ceil(n p_mask).

    Returns:
        The chosen positions, bool, and their share k / n of their group.
    """
    group = group.masked_fill(~target, -1).flatten()
    order = draw.flatten().argsort()
    order = order[t.flatten()[order].argsort(stable=True)]
    order = order[group[order].argsort(stable=True)]  # by group, then time, then draw

    group, time = group[order], t.flatten()[order]
    first = torch.ones_like(group, dtype=torch.bool)
    first[1:] = (group[1:] != group[:-1]) | (time[1:] != time[:-1])
    run = first.cumsum(0) - 1  # [N] number of the run of each place in sorted order
    place = torch.arange(len(run), device=run.device)
    start = torch.zeros_like(place).scatter_reduce(0, run, place, "amin", include_self=False)
    n = torch.zeros_like(place).scatter_add(0, run, torch.ones_like(place))[run]
    expected = n * p_mask.flatten()[order]
    k = expected.round().clamp_min(1) if nearest else expected.ceil()
    chosen = (place - start[run] < k) & (group >= 0)

    chosen = torch.zeros_like(chosen).scatter(0, order, chosen)
    share = torch.zeros_like(expected).scatter(0, order, k / n)
    return chosen.view_as(target), share.view_as(p_mask)
