"""The one unmasking loop: which tokens first, how many at a time, and which to think over again.

A sampler is put together from an order (which positions are surest), a commit rule (how many of
them are committed in a step), a block length, a temperature, and at will guidance and re-masking.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.guidance import ClassifierFreeGuidance
from mmdlm.core.noise import MaskNoise, Noise
from mmdlm.core.schedule import Linear, MaskSchedule
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import GENERATED, Modality, Vocabulary

_CHUNK = 1 << 22  # elements of float64 noise drawn at a time (32 MB)


@dataclass(frozen=True)
class Progress:
    """Where each row stands in its current block; all [B] int64.

    size   targets of the block
    open   those not committed yet
    step   steps taken in this block before the present one
    steps  steps the block may take
    """

    size: Tensor
    open: Tensor
    step: Tensor
    steps: Tensor

    @property
    def last(self) -> Tensor:
        """[B] bool: this is the last step of the block."""
        return self.step + 1 >= self.steps

    def rows(self, index: Tensor) -> Progress:
        """Of some rows."""
        return Progress(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


# ---- order: which positions first ---------------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """The M open positions of one modality and the token drawn for each.

    logits    [M, R] float32, guided, without postponed ids, and before temperature, top-k and top-p
              unless the sampler's `order_after_temperature` is set
    log_prob  [M] log softmax(logits) of the drawn token
    column    [M] place in the row
    step      [M] as in `Progress`
    steps     [M]
    """

    logits: Tensor
    log_prob: Tensor
    column: Tensor
    step: Tensor
    steps: Tensor


class Order(ABC):
    """Scores the candidates; those of highest score are committed first."""

    @abstractmethod
    def score(self, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        """[M] scores."""


@dataclass(frozen=True)
class Ranked(Order):
    """The order of some number that the model gives each candidate, at will with Gumbel noise.

    temperature  of the noise. Constant, it draws the positions without replacement from
                 softmax(value / temperature), as Dream's alg_temp does
    decay        "linear": temperature * (1 - (step + 1) / steps), to zero at the last step of a
                 block (MaskGIT). "none": it stays (Lumina-DiMOO, Dream). "compounding" multiplies
                 the linear factors from step to step, as Show-o and MMaDA do; only to reproduce
                 their results
    """

    temperature: float = 0.0
    decay: Literal["linear", "compounding", "none"] = "linear"

    @abstractmethod
    def value(self, candidates: Candidates) -> Tensor:
        """[M], the higher the surer."""

    def score(self, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        score = self.value(candidates).double()
        if self.temperature == 0.0:
            return score
        return score + self.temperature * self._decay(candidates) * _gumbel_like(score, generator)

    def _decay(self, candidates: Candidates) -> Tensor:
        done, steps = (candidates.step + 1).double(), candidates.steps.double()
        if self.decay == "none":
            return torch.ones_like(done)
        if self.decay == "linear":
            return 1 - done / steps
        # prod_{i = 1 .. done} (1 - i / steps) = (steps - 1)! / (steps - done - 1)! / steps^done
        return (torch.lgamma(steps) - torch.lgamma(steps - done) - done * steps.log()).exp()


@dataclass(frozen=True)
class Confidence(Ranked):
    """The log probability of the drawn token (LLaDA's low-confidence re-masking, MaskGIT).

    Source: arXiv:2202.04200, section 3.2; noise: its published code.
    """

    def value(self, candidates: Candidates) -> Tensor:
        return candidates.log_prob


@dataclass(frozen=True)
class Probability(Ranked):
    """The probability of the drawn token: `Confidence`, except where there is noise (Dream)."""

    def value(self, candidates: Candidates) -> Tensor:
        return candidates.log_prob.exp()


@dataclass(frozen=True)
class Margin(Ranked):
    """The gap between the two most likely tokens. Source: arXiv:2502.06768, section 4.1."""

    def value(self, candidates: Candidates) -> Tensor:
        log_z = candidates.logits.logsumexp(-1, keepdim=True)
        best = candidates.logits.topk(min(2, candidates.logits.shape[-1]), dim=-1).values
        probability = (best - log_z).exp()
        return probability[:, 0] - probability[:, 1:].sum(-1)


@dataclass(frozen=True)
class Entropy(Ranked):
    """Least entropy first. Source: arXiv:2508.15487 (Dream), decoding strategies."""

    def value(self, candidates: Candidates) -> Tensor:
        return -torch.special.entr(candidates.logits.softmax(-1)).sum(-1)


@dataclass(frozen=True)
class Random(Order):
    """Uniformly at random: the ancestral sampler's order."""

    def score(self, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        like = candidates.log_prob
        return torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float64)


@dataclass(frozen=True)
class LeftToRight(Order):
    """In reading order."""

    def score(self, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        return -candidates.column.double()


# ---- commit rule: how many ----------------------------------------------------------------------


class CommitRule(ABC):
    """How many tokens of the current block are committed in a step."""

    @property
    def planned(self) -> bool:
        """Whether the step alone says how many stay open, whatever was drawn before.

        The sampler then sees to it that each step commits one token at least. False: the number
        follows from what is open, and a step may commit nothing.
        """
        return True

    @abstractmethod
    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        """[B] how many of the block's `size` targets may be open after this step.

        The sampler sees to it that none is after the last one.
        """

    def choose(
        self,
        score: Tensor,
        probability: Tensor,
        *,
        among: Tensor,
        count: Tensor,
        progress: Progress,
    ) -> Tensor:
        """[B, L] bool, which tokens `among` the open ones are committed: `count` [B] of them.

        score        [B, L] of the order
        probability  [B, L] of the drawn tokens
        """
        return _highest(score, among, count)


@dataclass(frozen=True)
class EvenSplit(CommitRule):
    """The same number each step, the remainder one by one in the first steps (LLaDA)."""

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        each, rest = progress.size // progress.steps, progress.size % progress.steps
        done = progress.step + 1
        return progress.size - each * done - torch.minimum(done, rest)


@dataclass(frozen=True)
class ScheduledCount(CommitRule):
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
            raise ValueError(f"ScheduledCount: least must not be negative, got {self.least}")

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        t = 1 - (progress.step + 1).double() / progress.steps
        expected = progress.size * self.schedule.p_mask(t)
        left = expected.ceil() - 1 if self.strict else expected.floor()
        return left.long().clamp_min(self.least)


@dataclass(frozen=True)
class PlannedCount(CommitRule):
    """The counts of `ScheduledCount`, each raised to one at least when the block is begun.

    What that costs is taken one by one from the other counts, those of the last steps first; with
    more steps than tokens there are as many as tokens. LaViDa's, with `Shifted()`.
    Source: published code of arXiv:2505.16839 (LaViDa).
    """

    schedule: MaskSchedule

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        rows = zip(
            progress.size.tolist(), progress.steps.tolist(), progress.step.tolist(), strict=True
        )
        left = [
            sum(_planned_counts(self.schedule, size, steps)[step + 1 :])
            for size, steps, step in rows
        ]
        return torch.tensor(left, device=progress.size.device, dtype=torch.int64)


@lru_cache(maxsize=256)
def _planned_counts(schedule: MaskSchedule, size: int, steps: int) -> tuple[int, ...]:
    """What each step commits; in single precision, as published."""
    steps = min(steps, size)
    left = (size * schedule.p_mask(torch.linspace(0, 1, steps + 1))).long().tolist()  # [S + 1]
    left[0], left[steps] = 0, size
    counts = [max(1, after - before) for before, after in pairwise(left)]  # the last step first
    surplus = sum(counts) - size
    while surplus > 0:
        for i, count in enumerate(counts):
            if surplus > 0 and count > 1:
                counts[i], surplus = count - 1, surplus - 1
    return tuple(reversed(counts))


@dataclass(frozen=True)
class Ancestral(CommitRule):
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
class CatchUp(CommitRule):
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
        most = int(progress.steps.max())
        done = torch.arange(1, most + 1, device=progress.steps.device).double()  # [S]
        t = (1 - done / progress.steps[:, None]).clamp_min(0.0)  # [B, S]
        left = (progress.size[:, None] * self.schedule.p_mask(t)).ceil()
        to_come = (done > progress.step[:, None]) & (done < progress.steps[:, None])
        below = to_come & (left < progress.open[:, None])
        return left.masked_fill(~below, 0.0).amax(1).long()


@dataclass(frozen=True)
class Threshold(CommitRule):
    """Every token of at least this probability, and as many as `otherwise` asks for.

    With as many steps as tokens that is one at least (Fast-dLLM); with fewer, the budget still
    suffices.

    alone  where a token reaches the threshold only those that do; `otherwise` counts in steps
           without any. Dimple's confident decoding, with `CatchUp()`

    Source: arXiv:2505.22618, section 3.3; alone: arXiv:2505.16990.
    """

    threshold: float = 0.9
    otherwise: CommitRule = EvenSplit()
    alone: bool = False

    @property
    def planned(self) -> bool:
        return self.otherwise.planned

    def remaining(self, progress: Progress, *, generator: torch.Generator) -> Tensor:
        return self.otherwise.remaining(progress, generator=generator)

    def choose(
        self,
        score: Tensor,
        probability: Tensor,
        *,
        among: Tensor,
        count: Tensor,
        progress: Progress,
    ) -> Tensor:
        sure = among & (probability >= self.threshold)
        if self.alone:
            count = count.masked_fill(sure.any(1) & ~progress.last, 0)
        return sure | _highest(score, among, count)


# ---- re-masking: a change of mind ---------------------------------------------------------------


@dataclass(frozen=True)
class Remasking:
    """Committed tokens of the current block become noise again with probability sigma.

    More tokens are committed in return, so that the number open follows the commit rule all the
    same; that caps sigma at sigma_max = min(1, (1 - alpha_s) / alpha_t).

    rule           "cap": sigma = min(eta, sigma_max); "rescale": sigma = eta * sigma_max
    by_confidence  choose them by softmax(-probability at which they were committed), not uniformly
    between        times (1 at the start of a block, 0 at its end) between which it happens

    With more steps than tokens use `ScheduledCount`, which leaves room to the end.
    Source: arXiv:2503.00307, section 4.1; counts are rounded at random where the paper draws each
    token on its own.
    """

    eta: float
    rule: Literal["cap", "rescale"] = "cap"
    by_confidence: bool = False
    between: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"Remasking: eta must lie in [0, 1], got {self.eta}")

    def choose(
        self,
        committed: Tensor,
        probability: Tensor,
        *,
        remaining: Tensor,
        progress: Progress,
        generator: torch.Generator,
    ) -> Tensor:
        """[B, L] bool, which `committed` tokens go back; at most `remaining` [B] in a row."""
        number = committed.sum(1)
        sigma_max = (remaining / number.clamp_min(1)).clamp_max(1.0)
        sigma = self.eta * sigma_max if self.rule == "rescale" else sigma_max.clamp_max(self.eta)
        t = 1 - progress.step / progress.steps
        sigma = sigma * ((t >= self.between[0]) & (t <= self.between[1]))
        u = torch.rand(sigma.shape, generator=generator, device=sigma.device)
        count = torch.minimum((sigma * number + u).floor().long(), remaining)
        score = _gumbel_like(probability.double(), generator)
        return _highest(score - probability if self.by_confidence else score, committed, count)


# ---- the loop -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleStep:
    """The state after one denoising step.

    ids        [B, L] committed and given tokens; noise where a target is still open
    committed  [B, L] bool, targets committed so far
    step       0, 1, ... ; at most `steps` of them, fewer where everything was committed before
    log_prob   [B, L] of each committed token when it was committed, 0 elsewhere: under the model's
               guided logits, at temperature 1 and before top-k and top-p, whatever it was drawn by
    """

    ids: Tensor
    committed: Tensor
    step: int
    steps: int
    log_prob: Tensor


@dataclass(frozen=True)
class SampleOutput:
    """What became of a batch.

    ids       [B, L] the batch's ids with the targets filled
    steps     [B, L] the step at which each target was committed (for good), -1 elsewhere, and where
              the mask token was drawn for good or the row was stopped before
    log_prob  [B, L] of each of these tokens when it was committed, see `SampleStep`; 0 elsewhere
    """

    ids: Tensor
    steps: Tensor
    log_prob: Tensor


@dataclass(frozen=True)
class Sampler:
    """Fills the targets of a batch; whatever is not a target is context and stays as it is.

    steps           denoising steps for a row, spread evenly over its blocks, remainder first
    block_length    blocks are runs of this many targets of a row, in reading order, one finished
                    before the next begins; None: all of them at once
    order, commit   which of the open tokens are committed, and how many
    temperature     of the draw of tokens; 0 takes the most likely one. It never decays
    top_k, top_p    restrict the draw
    guidance_scale  see `ClassifierFreeGuidance`; 1 is off, several for several branches
    remask          lets committed tokens become noise again
    noise           what stands at open positions: the mask token, or for a model of another
                    process a token drawn anew each step; the model must have been trained with it
    suppressed      ids that are never generated
    postponed       ids that the order does not see, so that a position for which one is drawn has
                    probability 0 and comes last (LLaDA's option for the end of a turn)
    stop_ids        ids that end a row's last text: once one is committed, with all targets before
                    it, the row is left as it is, noise behind the end included, and takes no more
                    part in forward passes

    Logits are restricted to the id range of each position's modality, the mask token is never
    drawn, and the order looks at probabilities before temperature, top-k and top-p. These options
    are for results of systems that do otherwise:

    order_after_temperature  the order looks at the probabilities that tokens are drawn from (Dream)
    whole_vocabulary         a text position may become any id, image codes included (LLaDA, MMaDA)
    mask_drawn               the mask token may be drawn: the position stays open, though a planned
                             count takes it for committed, and may be so in the end (LLaDA, Dream)

    The result is a function of the arguments and the generator alone.
    """

    steps: int
    block_length: int | None = None
    order: Order = Confidence()
    commit: CommitRule = EvenSplit()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float | tuple[float, ...] = 1.0
    remask: Remasking | None = None
    noise: Noise = MaskNoise()
    suppressed: tuple[int, ...] = ()
    postponed: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    order_after_temperature: bool = False
    whole_vocabulary: bool = False
    mask_drawn: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler: steps must be at least 1, got {self.steps}")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"sampler: block_length must be at least 1, got {self.block_length}")
        if self.temperature < 0:
            raise ValueError(f"sampler: temperature must not be negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sampler: top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"sampler: top_p must lie in (0, 1], got {self.top_p}")

    def __call__(
        self,
        denoiser: Denoiser,
        batch: Batch,
        *,
        generator: torch.Generator,
        unconditional: Batch | tuple[Batch, ...] | None = None,
    ) -> SampleOutput:
        """Run `trajectory` to its end."""
        ids, steps = batch.ids.clone(), torch.full_like(batch.ids, -1)
        committed = torch.zeros_like(batch.target)
        log_prob = torch.zeros(ids.shape, device=ids.device)
        for state in self.trajectory(
            denoiser, batch, generator=generator, unconditional=unconditional
        ):
            steps = steps.masked_fill(state.committed & ~committed, state.step)
            ids, committed, log_prob = state.ids, state.committed, state.log_prob
        return SampleOutput(ids=ids, steps=steps, log_prob=log_prob)

    @torch.no_grad()
    def trajectory(
        self,
        denoiser: Denoiser,
        batch: Batch,
        *,
        generator: torch.Generator,
        unconditional: Batch | tuple[Batch, ...] | None = None,
    ) -> Iterator[SampleStep]:
        """One item for each denoising step.

        unconditional  the other branch of guidance, or several; default: the batch without its
                       context
        """
        vocabulary, target = denoiser.vocabulary, batch.target
        _check_ranges(batch, vocabulary)
        block_of, blocks = self._blocks(target)
        guidance = ClassifierFreeGuidance(self.guidance_scale)
        live, part = torch.arange(len(batch), device=target.device), batch
        guided = guidance(denoiser, part, unconditional=unconditional)
        fill = partial(
            self.noise.fill, modality=batch.modality, vocabulary=vocabulary, generator=generator
        )

        all_noise = torch.ones(target.shape, device=target.device)
        x_t = fill(batch.ids, target, p_mask=all_noise)
        committed = torch.zeros_like(target)
        probability = torch.zeros_like(all_noise)  # of each committed token, when it was committed
        log_prob = torch.zeros_like(all_noise)
        each, rest = self.steps // blocks.clamp_min(1), self.steps % blocks.clamp_min(1)
        block = torch.zeros_like(blocks)  # [B] the block each row is at
        taken = torch.zeros_like(blocks)  # [B] steps it has taken there
        void = torch.zeros_like(blocks)  # [B] planned tokens for which the mask token was drawn

        for step in range(self.steps):
            if bool((block >= blocks).all()):
                return
            here = target & (block_of == block[:, None])  # [B, L]
            begun = target & (block_of <= block[:, None]) & (block < blocks)[:, None]
            still_open = begun & ~committed  # of an earlier block only where the mask was drawn
            progress = Progress(
                size=here.sum(1),
                open=still_open.sum(1) - void,
                step=taken,
                steps=each + (block < rest),
            )
            if self.stop_ids and int((block < blocks).sum()) < len(live):
                live = (block < blocks).nonzero().squeeze(1)
                part = batch.rows(live)
                guided = guidance(denoiser, part, unconditional=_rows(unconditional, live))
            hidden = guided.hidden(x_t[live], part)
            drawn = self._draw(
                guided, hidden, still_open[live], part, progress.rows(live), generator
            )
            drawn = drawn.among(live, len(batch))

            remaining = self._remaining(progress, generator)  # [B]
            again = torch.zeros_like(target)
            if self.remask is not None:
                again = self.remask.choose(
                    here & committed,
                    probability,
                    remaining=remaining,
                    progress=progress,
                    generator=generator,
                )
            count = progress.open + again.sum(1) - remaining
            chosen = self.commit.choose(
                drawn.score, drawn.probability, among=still_open, count=count, progress=progress
            )
            masks = chosen & (drawn.ids == vocabulary.mask_id)
            void = void + masks.sum(1) * self.commit.planned
            chosen &= ~masks

            committed = (committed & ~again) | chosen
            probability = torch.where(chosen, drawn.probability, probability)
            log_prob = torch.where(chosen, drawn.log_prob, log_prob).masked_fill(~committed, 0.0)
            left = (begun & ~committed).sum(1) - void
            noisiness = torch.where(here, (left / progress.size.clamp_min(1))[:, None], all_noise)
            x_t = torch.where(still_open, drawn.ids, x_t)
            x_t = fill(x_t, target & ~committed, p_mask=noisiness)
            yield SampleStep(
                ids=x_t, committed=committed, step=step, steps=self.steps, log_prob=log_prob
            )

            finished = (left == 0) | progress.last
            if self.remask is not None:
                finished &= remaining == 0  # until then the plan leaves room for second thoughts
            block = torch.where(self._stopped(x_t, committed, batch), blocks, block + finished)
            taken = torch.where(finished, 0, taken + 1)

    def _stopped(self, x_t: Tensor, committed: Tensor, batch: Batch) -> Tensor:
        """[B] bool, whose last text has come to its end."""
        if not self.stop_ids:
            return torch.zeros(len(x_t), dtype=torch.bool, device=x_t.device)
        stop = torch.isin(x_t, torch.tensor(self.stop_ids, device=x_t.device))
        none_before = (batch.target & ~committed).cumsum(1) == 0
        last = batch.segment.masked_fill(~batch.target, -1).amax(1, keepdim=True)
        ends = stop & committed & none_before & batch.of(Modality.TEXT) & (batch.segment == last)
        return ends.any(1)

    def _blocks(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L] number of the block of each target, [B] number of blocks of each row."""
        place = target.cumsum(1) - 1
        length = self.block_length or target.shape[1]
        blocks = (target.sum(1) + length - 1) // length
        most = int(blocks.max()) if len(blocks) else 0
        if most > self.steps:
            raise ValueError(
                f"sampler: {self.steps} steps are too few for {most} blocks of {length} tokens; "
                "raise steps or block_length"
            )
        return place // length, blocks

    def _remaining(self, progress: Progress, generator: torch.Generator) -> Tensor:
        """[B] the commit rule's count; a planned step commits one at least, the last one all."""
        remaining = self.commit.remaining(progress, generator=generator).clamp_min(0)
        if self.remask is None and self.commit.planned:
            remaining = torch.minimum(remaining, (progress.open - 1).clamp_min(0))
        return remaining.masked_fill(progress.last, 0)

    def _draw(
        self,
        denoiser: Denoiser,
        hidden: Tensor,
        still_open: Tensor,
        batch: Batch,
        progress: Progress,
        generator: torch.Generator,
    ) -> _Drawn:
        """A token for each open position of the current blocks, its probability and its score."""
        vocabulary = denoiser.vocabulary
        ids = torch.zeros_like(batch.ids)
        score = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
        probability = torch.zeros(ids.shape, device=ids.device)
        own = torch.zeros(ids.shape, device=ids.device)
        for modality in GENERATED:
            start, stop = vocabulary.range(modality)
            if start == stop:
                continue
            if self.whole_vocabulary and modality == Modality.TEXT:
                start, stop = 0, vocabulary.size
            here = still_open & batch.of(modality)
            logits = denoiser.logits_at(hidden, here, ids=(start, stop)).float()  # [M, R]
            logits = _without(logits, self.suppressed, start)
            mask = () if self.mask_drawn else (vocabulary.mask_id,)
            drawable = _without(logits, mask, start)
            token = self._categorical(drawable, generator)  # [M]
            plain = logits
            if self.order_after_temperature:
                logits = _in_parts(
                    self._tempered, _without(drawable, self.postponed, start)
                ).float()
            else:
                logits = _without(logits, self.postponed, start)
            log_prob = _log_prob(logits, token)
            row, column = here.nonzero(as_tuple=True)
            candidates = Candidates(
                logits=logits,
                log_prob=log_prob,
                column=column,
                step=progress.step[row],
                steps=progress.steps[row],
            )
            ids = ids.masked_scatter(here, token + start)
            score = score.masked_scatter(here, self.order.score(candidates, generator=generator))
            probability = probability.masked_scatter(here, log_prob.exp())
            if logits is not plain:
                log_prob = _log_prob(plain, token)
            own = own.masked_scatter(here, log_prob)
        return _Drawn(ids=ids, score=score, probability=probability, log_prob=own)

    def _categorical(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """[M, R] -> [M] by Gumbel-max in float64; float32 loses rare tokens (arXiv:2409.02908)."""
        if self.temperature == 0.0:
            return logits.argmax(-1)

        def gumbel_max(part: Tensor) -> Tensor:
            part = self._tempered(part)
            return (part + _gumbel_like(part, generator)).argmax(-1)

        return _in_parts(gumbel_max, logits)

    def _tempered(self, logits: Tensor) -> Tensor:
        """[M, R] logits under temperature, top-k and top-p, float64; at temperature 0 as at 1."""
        logits = logits.double() / (self.temperature or 1.0)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, index = logits.sort(dim=-1, descending=True)
            probability = ordered.softmax(-1)
            dropped = probability.cumsum(-1) - probability >= self.top_p  # by the mass before each
            logits = logits.masked_fill(dropped.scatter(-1, index, dropped), -math.inf)
        return logits


@dataclass(frozen=True)
class _Drawn:
    """All [B, L]; meaningful at open positions of the current block.

    probability  as the order sees it
    log_prob     see `SampleStep`
    """

    ids: Tensor
    score: Tensor
    probability: Tensor
    log_prob: Tensor

    def among(self, live: Tensor, rows: int) -> _Drawn:
        """What was drawn for some rows, put among all."""
        if len(live) == rows:
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _Drawn(
            **{
                name: value.new_zeros(rows, *value.shape[1:]).index_copy(0, live, value)
                for name, value in values.items()
            }
        )


def _log_prob(logits: Tensor, token: Tensor) -> Tensor:
    """Logits [M, R] -> [M] log probability of the tokens [M]."""
    return logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _rows(
    batches: Batch | tuple[Batch, ...] | None, index: Tensor
) -> Batch | tuple[Batch, ...] | None:
    if batches is None or isinstance(batches, Batch):
        return None if batches is None else batches.rows(index)
    return tuple(batch.rows(index) for batch in batches)


def _highest(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """[B, L] bool: the `count` [B] positions of highest score; ties go to the left."""
    lowest = torch.finfo(score.dtype).min
    score = score.clamp_min(lowest).masked_fill(~among, -math.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter(
        1, order, torch.arange(score.shape[1], device=score.device).expand_as(order)
    )
    return among & (rank < count[:, None])


def _gumbel_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise of the shape of `like`, float64."""
    u = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float64)
    return -(-u.log()).log()


def _in_parts(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """A function of the rows of [M, R], a bounded number of them at a time."""
    rows = max(1, _CHUNK // logits.shape[-1])
    return torch.cat([function(part) for part in logits.split(rows)])


def _without(logits: Tensor, ids: tuple[int, ...], start: int) -> Tensor:
    """[M, R] logits of the ids from `start` on, in which some ids have no probability."""
    columns = [i - start for i in ids if start <= i < start + logits.shape[-1]]
    if not columns:
        return logits
    return logits.index_fill(-1, torch.tensor(columns, device=logits.device), -math.inf)


def _check_ranges(batch: Batch, vocabulary: Vocabulary) -> None:
    for modality in GENERATED:
        start, stop = vocabulary.range(modality)
        if start == stop and bool((batch.target & batch.of(modality)).any()):
            raise ValueError(
                f"sampler: the batch asks for {modality.name} tokens, but the model's vocabulary "
                "has none; take a model that was trained with them"
            )
