"""Choose how many tokens a denoising step commits, and which."""

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
    """How far each row has come in its current block; all [B] int64.

    Attributes:
        size: Targets of the block.
        open: Those that are not committed yet.
        step: Steps taken in this block before the present one.
        steps: Steps that the block may take.
        on_host: [4, B], the same on the host, if the device has been asked; see `numbers`.
    """

    size: Tensor
    open: Tensor
    step: Tensor
    steps: Tensor
    on_host: Tensor | None = None

    @property
    def last(self) -> Tensor:
        """Whether this is the last step of the block, [B] bool."""
        return self.step + 1 >= self.steps

    @property
    def each(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors `size`, `open`, `step` and `steps`."""
        return self.size, self.open, self.step, self.steps

    def rows(self, index: Tensor | slice) -> Progress:
        """Select some rows."""
        known = self.on_host
        known = None if known is None or isinstance(index, Tensor) else known[:, index]
        size, open_, step, steps = (one[index] for one in self.each)
        return Progress(size, open_, step, steps, on_host=known)

    def numbers(self) -> list[list[int]]:
        """Return [size, open, step, steps] of each row; the device is asked at most once."""
        known = self.on_host
        known = on_host(torch.stack(self.each)) if known is None else known
        numbers: list[list[int]] = known.T.numpy().tolist()
        return numbers


class UnmaskingRule(ABC):
    """Choose how many tokens of the current block are committed in a step.

    A rule of one's own is a frozen dataclass with `remaining`, and `choose` where it does not take
    the tokens of highest score; its class path stands for it: `schedule: my_module.MyRule` in YAML,
    `--schedule my_module.MyRule` on the command line.
    """

    @property
    def planned(self) -> bool:
        """Whether the number that stays open follows from the step only, not from what was drawn.

        The sampler then makes each step commit at least one token. False: the number follows from
        what is open, and a step may commit nothing.
        """
        return True

    @abstractmethod
    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        """Return how many of the `size` targets of the block may be open after this step.

        Args:
            progress: Of each row in its block.
            generator: The only source of random numbers.

        Returns:
            [B] of any dtype; a fraction is rounded down. The sampler leaves none open after the
            last step.
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
        """Choose the tokens to commit; here the `count` of highest score.

        Args:
            score: [B, L] float64, of the order.
            probability: [B, L] of the drawn tokens.
            words: [B, L] their ids; below 0 for what is not a word, and may stand anywhere.
            among: [B, L] bool, open targets.
            count: [B] how many to commit.
            progress: Of each row in its block.

        Returns:
            [B, L] bool.
        """
        return highest(score, among, count)


@dataclass(frozen=True)
class UniformTransfer(UnmaskingRule):
    """Commit the same number in each step, the remainder one by one in the first (LLaDA)."""

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        """Return how many targets stay open, see `UnmaskingRule.remaining`."""
        each, rest = progress.size // progress.steps, progress.size % progress.steps
        done = progress.step + 1
        return progress.size - each * done - torch.minimum(done, rest)


@dataclass(frozen=True)
class ScheduledTransfer(UnmaskingRule):
    """Leave floor(size * p_mask(t)) open, t falling evenly from 1 to 0 (MaskGIT: `Cosine()`).

    Source: arXiv:2202.04200, section 3.2.

    Attributes:
        schedule: Gives p_mask(t).
        least: So many stay open until the last step; MaskGIT, MMaDA and Lumina-DiMOO: 1.
        strict: Leave fewer than size * p_mask(t), not floor. Published code computes in single
            precision, in which cos(pi / 3) is below one half: strict gives its counts.
    """

    schedule: MaskSchedule
    least: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.least < 0:
            raise ValueError(f"ScheduledTransfer: least must not be negative, got {self.least}")

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        """Return how many targets stay open, see `UnmaskingRule.remaining`."""
        t = 1 - (progress.step + 1).double() / progress.steps
        expected = progress.size * self.schedule.p_mask(t)
        left = expected.ceil() - 1 if self.strict else expected.floor()
        return left.long().clamp_min(self.least)


@dataclass(frozen=True)
class PlannedTransfer(UnmaskingRule):
    """Commit the counts of `ScheduledTransfer`, each raised to at least one in advance.

    What that costs is taken one by one from the other counts, those of the last steps first; with
    more steps than tokens there are as many steps as tokens. LaViDa's, with `Shifted()`.

    Source: published code of arXiv:2505.16839 (LaViDa).

    Attributes:
        schedule: Gives p_mask(t).
    """

    schedule: MaskSchedule

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        """Return how many targets stay open, see `UnmaskingRule.remaining`."""
        left = [
            sum(_planned_counts(self.schedule, size, steps)[step + 1 :])
            for size, _, step, steps in progress.numbers()
        ]
        return sent(torch.tensor(left, dtype=torch.int64), progress.size.device)


@lru_cache(maxsize=256)
def _planned_counts(schedule: MaskSchedule, size: int, steps: int) -> tuple[int, ...]:
    """Return how many tokens each step commits; in single precision, as published."""
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
    """Commit each open token with probability 1 - p_mask(s) / p_mask(t), s the next time.

    Times fall evenly from 1 to 0, so that `Linear(eps)` gives Dream's linspace(1, eps).

    Source: arXiv:2406.07524, section 3.2; rounded: published code of arXiv:2508.15487 (Dream).

    Attributes:
        schedule: Gives p_mask(t).
        drawn: False: the expected number, rounded down. True: each on its own, which with the order
            `Random()` is the reverse process itself (Dream's "origin", MDLM).
    """

    schedule: MaskSchedule = Linear(1e-3)
    drawn: bool = False

    @property
    def planned(self) -> bool:
        """See `UnmaskingRule.planned`."""
        return False

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        """Return how many targets stay open, see `UnmaskingRule.remaining`."""
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
    """Leave open the next number of the schedule that is below what is open.

    The schedule is ceil(size * p_mask(t)), t falling evenly from 1 to 0. A row ahead of its
    schedule goes on from where it is, and does not wait for it.

    Source: published code of arXiv:2505.16990 (Dimple).

    Attributes:
        schedule: Gives p_mask(t).
    """

    schedule: MaskSchedule = Linear(1e-3)

    @property
    def planned(self) -> bool:
        """See `UnmaskingRule.planned`."""
        return False

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        """Return how many targets stay open, see `UnmaskingRule.remaining`."""
        most = max(steps for *_, steps in progress.numbers())
        done = torch.arange(1, most + 1, device=progress.steps.device).double()  # [S]
        t = (1 - done / progress.steps[:, None]).clamp_min(0.0)  # [B, S]
        left = (progress.size[:, None] * self.schedule.p_mask(t)).ceil()
        to_come = (done > progress.step[:, None]) & (done < progress.steps[:, None])
        below = to_come & (left < progress.open[:, None])
        return left.masked_fill(~below, 0.0).amax(1).long()


@dataclass(frozen=True)
class Parallel(UnmaskingRule):
    """Commit every token that the model is sure enough of, and as many as `fallback` asks for.

    With as many steps as tokens that is at least one (Fast-dLLM); with fewer, the budget is still
    enough.

    Attributes:
        fallback: Asks for a number of tokens whether the model is sure or not.
        exclusive: In a step in which the model is sure of some token commit only those; `fallback`
            counts in the other steps. Dimple's confident decoding, with `CatchUpTransfer()`.
        in_order: Sure tokens wait for the tokens before them in the order that are not sure. From
            left to right, a text then grows without gaps whose words could not be seen yet.
        distinct: Of several sure tokens of one word commit only the first in the order, beside
            those that `fallback` asks for: tokens committed in one step are predicted
            independently, so a word can appear twice. Ours.
    """

    fallback: UnmaskingRule = field(default=UniformTransfer(), kw_only=True)
    exclusive: bool = field(default=False, kw_only=True)
    in_order: bool = field(default=False, kw_only=True)
    distinct: bool = field(default=False, kw_only=True)

    @property
    def planned(self) -> bool:
        """See `UnmaskingRule.planned`."""
        return self.fallback.planned

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        """Return how many targets stay open, see `UnmaskingRule.remaining`."""
        return self.fallback.remaining(progress, generator=generator)

    @abstractmethod
    def sure(self, score: Tensor, probability: Tensor, *, among: Tensor) -> Tensor:
        """Choose tokens `among` the open ones that can be committed together: [B, L] bool."""

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
        """Choose the tokens to commit, see `UnmaskingRule.choose`."""
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
    """Take tokens of at least this probability as sure.

    Source: arXiv:2505.22618, section 3.3; exclusive: arXiv:2505.16990.

    Attributes:
        threshold: In [0, 1].
    """

    threshold: float = 0.9

    def sure(self, score: Tensor, probability: Tensor, *, among: Tensor) -> Tensor:
        """Choose the sure tokens, see `Parallel.sure`."""
        return among & (probability >= self.threshold)


@dataclass(frozen=True)
class Factor(Parallel):
    """Take the n likeliest tokens as sure, n the largest with (n + 1) (1 - p_(n)) < factor.

    p_(n) is the n-th probability. Below 1, greedy decoding of the n tokens at once is then greedy
    decoding of one after the other.

    Source: arXiv:2505.22618 (Fast-dLLM's factor, and its theorem on parallel decoding).

    Attributes:
        factor: Above 0.
    """

    factor: float = 1.0

    def sure(self, score: Tensor, probability: Tensor, *, among: Tensor) -> Tensor:
        """Choose the sure tokens, see `Parallel.sure`."""
        p = probability.double().masked_fill(~among, -1.0).sort(1, descending=True).values
        n = torch.arange(1, p.shape[1] + 1, device=p.device)
        fits = (p >= 0) & ((n + 1) * (1 - p) < self.factor)
        return highest(probability.double(), among, (fits * n).amax(1))


@dataclass(frozen=True)
class EntropyBound(Parallel):
    """Take the tokens of least entropy whose entropies, except the largest, sum to `bound`.

    What is lost by drawing them at once, not one after the other, is at most the bound: the sum of
    their entropies without the largest bounds their mutual information. The order has to be
    `Entropy()`, whose scores are the entropies.

    Source: arXiv:2505.24857 (EB-Sampler).

    Attributes:
        bound: In nats.
    """

    bound: float = 0.1

    def sure(self, score: Tensor, probability: Tensor, *, among: Tensor) -> Tensor:
        """Choose the sure tokens, see `Parallel.sure`."""
        entropy = (-score.double()).masked_fill(~among, math.inf).sort(1).values
        n = torch.arange(1, entropy.shape[1] + 1, device=entropy.device)
        fits = entropy.isfinite() & (entropy.cumsum(1) - entropy <= self.bound)
        return highest(score.double(), among, (fits * n).amax(1))


def _repeats(words: Tensor, score: Tensor, *, among: Tensor) -> Tensor:
    """Find the words that a token of higher score is as well; of equal scores the right ones.

    Args:
        words: [B, L] ids, below 0 for what is not a word.
        score: [B, L].
        among: [B, L] bool, where to look.

    Returns:
        [B, L] bool.
    """
    exclusive = -1 - torch.arange(words.shape[1], device=words.device)  # like no other
    words = torch.where(among & (words >= 0), words, exclusive)
    by_score = score.argsort(dim=1, descending=True, stable=True)
    ranked = words.gather(1, by_score).sort(dim=1, stable=True)  # of a word the highest comes first
    again = ranked.values == ranked.values.roll(1, dims=1)
    again[:, :1] = False
    return torch.zeros_like(among).scatter(1, by_score.gather(1, ranked.indices), again)


def highest(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Choose the `count` [B] positions of highest score; ties go to the left: [B, L] bool."""
    lowest = torch.finfo(score.dtype).min
    score = score.clamp_min(lowest).masked_fill(~among, -math.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter(
        1, order, torch.arange(score.shape[1], device=score.device).expand_as(order)
    )
    return among & (rank < count[:, None])


def check_shape(found: Tensor, wanted: Tensor, *, of: str) -> None:
    """Refuse a tensor of another shape, which a part of a user's own may give.

    Args:
        found: What the part gave.
        wanted: A tensor of the right shape.
        of: Name of the part, for the message.

    Raises:
        ValueError: If the shapes differ.
    """
    if found.shape != wanted.shape:
        raise ValueError(
            f"sampler: {of} gave a tensor of shape {tuple(found.shape)}, but {tuple(wanted.shape)} "
            "was asked for; mend it"
        )
