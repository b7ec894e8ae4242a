"""The commit rule: how many tokens a denoising step makes final, and which it takes back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from mmdlm.core.diffusion.schedule import Linear, MaskSchedule
from mmdlm.core.host_masks import on_host, sent


@dataclass(frozen=True)
class Progress:
    """Where each row stands in its current block; all [B] int64.

    size     targets of the block
    open     those not committed yet
    step     steps taken in this block before the present one
    steps    steps the block may take
    on_host  [4, B], the same on the host, where they have been asked for; see `numbers`
    """

    size: Tensor
    open: Tensor
    step: Tensor
    steps: Tensor
    on_host: Tensor | None = None

    @property
    def last(self) -> Tensor:
        """[B] bool: this is the last step of the block."""
        return self.step + 1 >= self.steps

    @property
    def each(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Size, open, step and steps."""
        return self.size, self.open, self.step, self.steps

    def rows(self, index: Tensor | slice) -> Progress:
        """Of some rows."""
        known = self.on_host
        known = None if known is None or isinstance(index, Tensor) else known[:, index]
        size, open_, step, steps = (one[index] for one in self.each)
        return Progress(size, open_, step, steps, on_host=known)

    def numbers(self) -> list[list[int]]:
        """[size, open, step, steps] of each row; a device is asked only if nobody has done so."""
        known = self.on_host
        known = on_host(torch.stack(self.each)) if known is None else known
        numbers: list[list[int]] = known.T.numpy().tolist()
        return numbers


class UnmaskingRule(ABC):
    """How many tokens of the current block are committed in a step.

    A rule of one's own is a frozen dataclass with `remaining`, and `choose` where it does not take
    the tokens of highest score; its class path stands for it: `schedule: my_module.MyRule` in YAML,
    `--schedule my_module.MyRule` on the command line.
    """

    @property
    def planned(self) -> bool:
        """Whether the step alone says how many stay open, whatever was drawn before.

        The sampler then sees to it that each step commits one token at least. False: the number
        follows from what is open, and a step may commit nothing.
        """
        return True

    @abstractmethod
    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        """[B] how many of the block's `size` targets may be open after this step, of any dtype.

        A fraction is rounded down. The sampler sees to it that none is after the last one.
        """

    def choose(
        self,
        score: Tensor,
        probability: Tensor,
        *,
        words: Tensor,
        among: Tensor,
        count: Tensor,
        progress: Progress,
    ) -> Tensor:
        """[B, L] bool, which tokens `among` the open ones are committed: `count` [B] of them.

        score        [B, L] of the order
        probability  [B, L] of the drawn tokens
        words        [B, L] their ids; below 0 what is no word, and may stand anywhere
        """
        return highest(score, among, count)


@dataclass(frozen=True)
class UniformTransfer(UnmaskingRule):
    """The same number each step, the remainder one by one in the first steps (LLaDA)."""

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        each, rest = progress.size // progress.steps, progress.size % progress.steps
        done = progress.step + 1
        return progress.size - each * done - torch.minimum(done, rest)


@dataclass(frozen=True)
class ScheduledTransfer(UnmaskingRule):
    """floor(size * p_mask(t)) stay open, t falling evenly from 1 to 0 (MaskGIT with `Cosine()`).

    least   so many stay open until the last step all the same; MaskGIT, MMaDA and Lumina-DiMOO: 1
    strict  fewer than size * p_mask(t), where others take floor. Published code computes in single
            precision, in which cos(pi / 3) is below one half: strict gives its counts

    Source: arXiv:2202.04200, section 3.2.
    """

    schedule: MaskSchedule
    least: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        if self.least < 0:
            raise ValueError(f"ScheduledTransfer: least must not be negative, got {self.least}")

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        t = 1 - (progress.step + 1).double() / progress.steps
        expected = progress.size * self.schedule.p_mask(t)
        left = expected.ceil() - 1 if self.strict else expected.floor()
        return left.long().clamp_min(self.least)


@dataclass(frozen=True)
class PlannedTransfer(UnmaskingRule):
    """The counts of `ScheduledTransfer`, each raised to one at least when the block is begun.

    What that costs is taken one by one from the other counts, those of the last steps first; with
    more steps than tokens there are as many as tokens. LaViDa's, with `Shifted()`.
    Source: published code of arXiv:2505.16839 (LaViDa).
    """

    schedule: MaskSchedule

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        left = [
            sum(_planned_counts(self.schedule, size, steps)[step + 1 :])
            for size, _, step, steps in progress.numbers()
        ]
        return sent(torch.tensor(left, dtype=torch.int64), progress.size.device)


@lru_cache(maxsize=256)
def _planned_counts(schedule: MaskSchedule, size: int, steps: int) -> tuple[int, ...]:
    """What each step commits; in single precision, as published."""
    steps = min(steps, size)
    left = (
        (size * schedule.p_mask(torch.linspace(0, 1, steps + 1))).long().numpy().tolist()
    )  # [S + 1]
    left[0], left[steps] = 0, size
    counts = [max(1, after - before) for before, after in pairwise(left)]  # the last step first
    surplus = sum(counts) - size
    while surplus > 0:
        for i, count in enumerate(counts):
            if surplus > 0 and count > 1:
                counts[i], surplus = count - 1, surplus - 1
    return tuple(reversed(counts))


@dataclass(frozen=True)
class Ancestral(UnmaskingRule):
    """Each open token is committed with probability 1 - p_mask(s) / p_mask(t), s the next time.

    Times fall evenly from 1 to 0, so that `Linear(eps)` gives Dream's linspace(1, eps).

    drawn  False: the expected number, rounded down. True: each on its own, which with the order
           `Random()` is the reverse process itself (Dream's "origin", MDLM)

    Source: arXiv:2406.07524, section 3.2; rounded: published code of arXiv:2508.15487 (Dream).
    """

    schedule: MaskSchedule = Linear(1e-3)
    drawn: bool = False

    @property
    def planned(self) -> bool:
        return False

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        t = 1 - progress.step.double() / progress.steps
        s = 1 - (progress.step + 1).double() / progress.steps
        # Single precision, as published, so that a product next to an integer is rounded as there.
        p_t, p_s = self.schedule.p_mask(t).float(), self.schedule.p_mask(s).float()
        share, open_ = (1 - p_s / p_t).clamp(0, 1), progress.open.float()
        if self.drawn:
            return progress.open - torch.binomial(open_, share, generator=generator).long()
        return progress.open - (open_ * share).long()


@dataclass(frozen=True)
class CatchUpTransfer(UnmaskingRule):
    """The first number of the schedule to come that is below what is open.

    ceil(size * p_mask(t)) are to stay open, t falling evenly from 1 to 0. A row ahead of its
    schedule goes on from where it is, and does not wait to be overtaken.
    Source: published code of arXiv:2505.16990 (Dimple).
    """

    schedule: MaskSchedule = Linear(1e-3)

    @property
    def planned(self) -> bool:
        return False

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        most = max(steps for *_, steps in progress.numbers())
        done = torch.arange(1, most + 1, device=progress.steps.device).double()  # [S]
        t = (1 - done / progress.steps[:, None]).clamp_min(0.0)  # [B, S]
        left = (progress.size[:, None] * self.schedule.p_mask(t)).ceil()
        to_come = (done > progress.step[:, None]) & (done < progress.steps[:, None])
        below = to_come & (left < progress.open[:, None])
        return left.masked_fill(~below, 0.0).amax(1).long()


@dataclass(frozen=True)
class Parallel(UnmaskingRule):
    """Every token that the model is sure enough of, and as many as `fallback` asks for.

    With as many steps as tokens that is one at least (Fast-dLLM); with fewer, the budget still
    suffices.

    exclusive     in a step in which the model is sure of some token only those; `fallback` counts
                  in
              the others. Dimple's confident decoding, with `CatchUpTransfer()`
    in_order  sure tokens wait for what comes before them in the order and is not sure. Read from
              left to right, a text so grows without gaps, whose words were not yet to be seen
    distinct  of several sure tokens of one word the first in the order alone, beside those that
              `fallback` asks for: tokens that do not know of each other put a word that has one
              place into two. Ours
    """

    fallback: UnmaskingRule = field(default=UniformTransfer(), kw_only=True)
    exclusive: bool = field(default=False, kw_only=True)
    in_order: bool = field(default=False, kw_only=True)
    distinct: bool = field(default=False, kw_only=True)

    @property
    def planned(self) -> bool:
        return self.fallback.planned

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        return self.fallback.remaining(progress, generator=generator)

    @abstractmethod
    def sure(self, score: Tensor, probability: Tensor, *, among: Tensor) -> Tensor:
        """[B, L] bool, tokens `among` the open ones that can be committed together."""

    def choose(
        self,
        score: Tensor,
        probability: Tensor,
        *,
        words: Tensor,
        among: Tensor,
        count: Tensor,
        progress: Progress,
    ) -> Tensor:
        sure = self.sure(score, probability, among=among)
        if self.distinct:
            sure &= ~_repeats(words, score, among=sure)
        if self.in_order:
            ranked = score.masked_fill(~among, -math.inf).sort(dim=1, descending=True, stable=True)
            sure = highest(score, among, sure.gather(1, ranked.indices).long().cumprod(1).sum(1))
        if self.exclusive:
            count = count.masked_fill(sure.any(1) & ~progress.last, 0)
        return sure | highest(score, among, count)


@dataclass(frozen=True)
class Threshold(Parallel):
    """Sure is what has at least this probability.

    Source: arXiv:2505.22618, section 3.3; alone: arXiv:2505.16990.
    """

    threshold: float = 0.9

    def sure(self, score: Tensor, probability: Tensor, *, among: Tensor) -> Tensor:
        return among & (probability >= self.threshold)


@dataclass(frozen=True)
class Factor(Parallel):
    """Sure are the n likeliest tokens, for the largest n with (n + 1) (1 - p_(n)) < factor.

    p_(n) is the n-th probability. Below 1 greedy decoding of the n tokens at once is then greedy
    decoding of one after the other.
    Source: arXiv:2505.22618 (Fast-dLLM's factor, and its theorem on parallel decoding).
    """

    factor: float = 1.0

    def sure(self, score: Tensor, probability: Tensor, *, among: Tensor) -> Tensor:
        p = probability.double().masked_fill(~among, -1.0).sort(1, descending=True).values
        n = torch.arange(1, p.shape[1] + 1, device=p.device)
        fits = (p >= 0) & ((n + 1) * (1 - p) < self.factor)
        return highest(probability.double(), among, (fits * n).amax(1))


@dataclass(frozen=True)
class EntropyBound(Parallel):
    """Sure are the tokens of least entropy whose entropies, but for the largest, sum to `bound`.

    What is lost by drawing them at once, not one after the other, is at most the bound: the sum of
    their entropies less the largest bounds their mutual information. `bound` is in nats, and the
    order has to be `Entropy()`, whose scores the entropies are.
    Source: arXiv:2505.24857 (EB-Sampler).
    """

    bound: float = 0.1

    def sure(self, score: Tensor, probability: Tensor, *, among: Tensor) -> Tensor:
        entropy = (-score.double()).masked_fill(~among, math.inf).sort(1).values
        n = torch.arange(1, entropy.shape[1] + 1, device=entropy.device)
        fits = entropy.isfinite() & (entropy.cumsum(1) - entropy <= self.bound)
        return highest(score.double(), among, (fits * n).amax(1))


def _repeats(words: Tensor, score: Tensor, *, among: Tensor) -> Tensor:
    """[B, L] bool, `among` these: what a token of higher score is as well; of ties the right ones.

    words  [B, L] ids, below 0 what is no word
    """
    exclusive = -1 - torch.arange(words.shape[1], device=words.device)  # like no other
    words = torch.where(among & (words >= 0), words, exclusive)
    by_score = score.argsort(dim=1, descending=True, stable=True)
    ranked = words.gather(1, by_score).sort(dim=1, stable=True)  # of a word the highest comes first
    again = ranked.values == ranked.values.roll(1, dims=1)
    again[:, :1] = False
    return torch.zeros_like(among).scatter(1, by_score.gather(1, ranked.indices), again)


def highest(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """[B, L] bool: the `count` [B] positions of highest score; ties go to the left."""
    lowest = torch.finfo(score.dtype).min
    score = score.clamp_min(lowest).masked_fill(~among, -math.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter(
        1, order, torch.arange(score.shape[1], device=score.device).expand_as(order)
    )
    return among & (rank < count[:, None])


def check_shape(found: Tensor, wanted: Tensor, *, of: str) -> None:
    """Refuse a tensor of another shape, which a part of a user's own may give.

    Raises:
        ValueError: If the shapes differ.
    """
    if found.shape != wanted.shape:
        raise ValueError(
            f"sampler: {of} gave a tensor of shape {tuple(found.shape)}, but {tuple(wanted.shape)} "
            "was asked for; mend it"
        )
