"""How likely a denoiser holds the targets of a batch to be.

An estimator draws views of a batch, which are noisy copies of it, and says how much the clean
tokens of each count. The same views serve a policy, the policy it was and the reference, so that
their log-probabilities differ by what the networks think and not by what was masked.

An estimator of one's own is a frozen dataclass with `draw`, which makes its views by
`mmdlm.core.likelihood.noisy_view`, and is named in YAML by its class path:

    @dataclass(frozen=True)
    class LastHalf(LikelihoodEstimator):
        def draw(self, batch, vocabulary, *, generator, iterations=1, scored=None, steps=None):
            scored = scored_targets(batch, scored)
            place = scored.cumsum(1)
            masked = scored & (2 * place > scored.sum(1, keepdim=True))
            weight = torch.ones(scored.shape, device=scored.device)
            view = masked_view(batch, vocabulary, masked, scored, weight=weight)
            return ((view,),) * iterations
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.diffusion.forward import exact_count
from mmdlm.core.diffusion.schedule import Linear, MaskSchedule
from mmdlm.core.likelihood.noisy_view import (
    NoisyView,
    document_numbers,
    maskable,
    masked_view,
    scored_targets,
    some_context,
)
from mmdlm.core.likelihood.order_probability import step_scores
from mmdlm.core.likelihood.token_scores import TokenScores, token_log_prob, token_scores
from mmdlm.core.sampling.order import Confidence
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import Parallel, Threshold, UnmaskingRule
from mmdlm.core.sequence import Batch, concatenate
from mmdlm.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class LikelihoodEstimator(ABC):
    """An estimate of log p(target tokens | context), token by token.

    at_once          views a forward pass takes
    kept_passes      forward passes whose activations are kept for the gradient, at least 1. Those
                     of all others are computed once more while it is taken, one pass at a time, so
                     that memory does not grow with the number of views; it takes up to a third
                     longer. Raise it where all fit into memory
    full_vocabulary  log-probabilities over all ids, not over the range of the position's modality
    """

    at_once: int = field(default=1, kw_only=True)
    kept_passes: int = field(default=1, kw_only=True)
    full_vocabulary: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self.check_counts()

    @abstractmethod
    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[tuple[NoisyView, ...], ...]:
        """The views of each of several passes over one batch (inner iterations).

        scored  [B, L] bool, targets to be covered; the others, which stand behind an answer's end,
                stay masked, so that no view gives its length away. Default: all targets
        steps   [B, L] int64, the step at which a sampler committed each target, -1 for never
        """

    def check(self, sampler: Sampler) -> None:
        """Raise ValueError where the estimate has no meaning for what a sampler does."""
        return

    def scores(
        self,
        denoiser: Denoiser,
        batch: Batch,
        views: Sequence[NoisyView],
        *,
        entropy: bool = False,
        undrawable: tuple[int, ...] = (),
    ) -> TokenScores:
        """Score the covered tokens of each view.

        Args:
            denoiser: The policy, or another model of the same vocabulary.
            batch: What the views are of.
            views: As `draw` made them.
            entropy: Whether to compute the entropies as well.
            undrawable: Ids that have no probability: those of `Sampler.undrawable`, so that
                log-probabilities are of the distribution that a policy's tokens were drawn from.
        """
        passes = [views[i : i + self.at_once] for i in range(0, len(views), self.at_once)]
        again = len(passes) - self.kept_passes if torch.is_grad_enabled() else 0
        log_probs: list[Tensor] = []
        entropies: list[Tensor] = []
        for number, some in enumerate(passes):
            x_t = torch.cat([view.x_t for view in some])
            score = partial(
                self.score_pass,
                denoiser=denoiser,
                batch=concatenate([batch] * len(some)) if len(some) > 1 else batch,
                views=some,
                entropy=entropy,
                undrawable=undrawable,
            )
            if number < again:  # the last ones are kept, which the gradient asks for first
                values, spread = checkpoint(score, x_t, use_reentrant=False)
            else:
                values, spread = score(x_t)
            log_probs += values.split(len(batch))
            entropies += [] if spread is None else spread.split(len(batch))
        return TokenScores(
            log_prob=torch.stack(log_probs),
            covered=torch.stack([view.covered for view in views]),
            weight=torch.stack([view.weight for view in views]),
            entropy=torch.stack(entropies) if entropies else None,
        )

    def score_pass(
        self,
        x_t: Tensor,
        *,
        denoiser: Denoiser,
        batch: Batch,
        views: Sequence[NoisyView],
        entropy: bool,
        undrawable: tuple[int, ...],
    ) -> tuple[Tensor, Tensor | None]:
        """Score the ids of K views, [K B, L], and as many copies of the batch in one forward pass.

        Returns log-probabilities and entropies, [K B, L].
        """
        return token_scores(
            denoiser,
            x_t,
            batch,
            where=torch.cat([view.covered for view in views]),
            full_vocabulary=self.full_vocabulary,
            entropy=entropy,
            without=undrawable,
        )

    def log_prob(self, denoiser: Denoiser, batch: Batch, views: Sequence[NoisyView]) -> Tensor:
        """[B, L] in nats, the weighted sum over the views; 0 where nothing is covered."""
        return self.scores(denoiser, batch, views).total

    def __call__(self, denoiser: Denoiser, batch: Batch, *, generator: torch.Generator) -> Tensor:
        """[B, L] in nats, 0 where nothing is a target; differentiable.

        The sum over a document is its log-likelihood, or a bound or a surrogate of it.
        """
        (views,) = self.draw(batch, denoiser.vocabulary, generator=generator)
        return self.log_prob(denoiser, batch, views)

    def check_counts(self, *names: str) -> None:
        """Raise ValueError for a field that is below 1: of some names, and of every estimator."""
        for name in ("at_once", "kept_passes", *names):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be at least 1, got {getattr(self, name)}"
                )

    def check_probabilities(self, *names: str) -> None:
        """Raise ValueError for a field of these that lies outside [0, 1]."""
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{type(self).__name__}: {name} must lie in [0, 1], got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class Nelbo:
    """The negative evidence lower bound of each document, in nats; all [B, L], by document number.

    value           0 where a row has no such document
    standard_error  of the Monte Carlo estimate
    tokens          int64, number of target tokens, for nats per token: value / tokens
    """

    value: Tensor
    standard_error: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Elbo(LikelihoodEstimator):
    """The evidence lower bound by Monte Carlo, in the exact-count form

        log p(x) >= E_{k ~ U{1 .. n}} n / k E_{S, |S| = k} sum_{i in S} log p(x_i | x without S)

    for the n targets of a document, whatever their modality. The counts of the `strata` draws of a
    repeat are spread evenly over 1 .. n; the standard error comes from the spread of the `repeats`,
    which are independent. `masks` sets S are drawn for each count. Unbiased for the bound.

    `Elbo(repeats=8, strata=1)` is VRPO's estimate with n_t = 8 and n_y = 1, in its ablation the
    best use of 8 forward passes; `masks` is n_y.

    Source: arXiv:2502.09992, appendix B.5 and its published evaluation (128 draws: 8 x 16); VRPO:
    arXiv:2505.19223, section 3.
    """

    repeats: int = 8
    strata: int = 16
    masks: int = 1

    def __post_init__(self) -> None:
        self.check_counts("repeats", "strata", "masks")

    @property
    def _number(self) -> int:
        return self.repeats * self.strata * self.masks

    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[tuple[NoisyView, ...], ...]:
        """Independent counts and sets for each iteration."""
        scored = scored_targets(batch, scored)
        return tuple(
            tuple(
                masked_view(batch, vocabulary, masked, scored, weight=1 / (self._number * share))
                for many, shares in self._sets(batch, scored, generator)
                for masked, share in zip(
                    many.split(len(batch)), shares.split(len(batch)), strict=True
                )
            )
            for _ in range(iterations)
        )

    @torch.no_grad()
    def nelbo(self, denoiser: Denoiser, batch: Batch, *, generator: torch.Generator) -> Nelbo:
        """The bound of each document and its standard error; `repeats` must be two or more."""
        if self.repeats < 2:
            raise ValueError("Elbo: a standard error needs at least 2 repeats, got 1")
        document = batch.document.clamp_min(0)
        draws = torch.stack(
            [
                torch.zeros_like(log_prob).scatter_add(1, document, log_prob)  # per document
                for log_prob in self._draws(denoiser, batch, generator)
            ]
        )
        means = -draws.unflatten(0, (self.repeats, -1)).mean(1)  # [repeats, B, L]
        return Nelbo(
            value=means.mean(0),
            standard_error=means.std(0) / self.repeats**0.5,
            tokens=torch.zeros_like(document).scatter_add(1, document, batch.target.long()),
        )

    def _draws(
        self, denoiser: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """`repeats` x `strata` x `masks` unbiased estimates [B, L], repeat by repeat."""
        for masked, share in self._sets(batch, batch.target, generator):
            log_prob = token_log_prob(
                denoiser,
                batch.ids.repeat(len(masked) // len(batch), 1).masked_fill(
                    masked, denoiser.vocabulary.mask_id
                ),
                concatenate([batch] * (len(masked) // len(batch))),
                where=masked,
                full_vocabulary=self.full_vocabulary,
            )
            yield from (log_prob / share).split(len(batch))

    def _sets(
        self, batch: Batch, scored: Tensor, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Masked sets and their shares k / n, [copies * B, L], for as many draws as go at once."""
        document = batch.document.clamp_min(0)
        device = document.device
        offset = torch.rand((self.repeats, *document.shape), generator=generator, device=device)
        times = [
            1 - (u.gather(1, document) + s / self.strata) % 1.0  # in (0, 1]: k is never 0
            for u in offset
            for s in range(self.strata)
            for _ in range(self.masks)
        ]
        for start in range(0, len(times), self.at_once):
            t = torch.cat(times[start : start + self.at_once])  # [copies * B, L]
            copies = len(t) // len(batch)
            row = torch.arange(len(t), device=device)[:, None]
            yield exact_count(
                scored.repeat(copies, 1),
                t,
                torch.rand(t.shape, generator=generator, device=device),
                group=row * t.shape[1] + batch.document.repeat(copies, 1),
                t=t,
            )


@dataclass(frozen=True)
class OneStepMeanField(LikelihoodEstimator):
    """All targets masked at once, one forward pass: log p(x) ~ sum_i log p(x_i | context).

    Each token of the context is masked, too, with probability `prompt_mask_prob`, drawn anew in
    each
    iteration: several updates on one batch then see different contexts. Structure (CONTROL) and
    feature slots stay. With prompt_mask_prob = 0 it is exact for one step of sampling that commits
    all
    targets, and for a model that looks at no target, and no bound otherwise.

    Source: arXiv:2504.12216 (d1), section on diffu-GRPO; 0.15 in its runs, 0.3 in its code's
    defaults. Departures from the code: there the micro-step chooses the seed of a mask, so that
    with accumulation each micro-batch sees half of the seeds, each twice, and the global generator
    is reseeded; left padding is attended to; special ids of the prompt are masked as well.
    """

    prompt_mask_prob: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_probabilities("prompt_mask_prob")

    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[tuple[NoisyView, ...], ...]:
        """One view an iteration."""
        scored = scored_targets(batch, scored)
        weight = torch.ones(scored.shape, device=scored.device)
        return tuple(
            (
                masked_view(
                    batch,
                    vocabulary,
                    scored,
                    scored,
                    weight=weight,
                    hidden=some_context(batch, self.prompt_mask_prob, generator),
                ),
            )
            for _ in range(iterations)
        )


def spread_timesteps(first: Tensor, iterations: int, total: int) -> Tensor:
    """First timesteps of any shape, int64 -> [iterations, ...]: the rest spread evenly to `total`.

        t_n = floor((n - 1) / (iterations - 1) (total - t_1) + t_1)

    From 100 of 1000 in 5 iterations: 100, 325, 550, 775, 1000.
    Source: arXiv:2505.15809, section on UniGRPO. Its worked example for these numbers goes on from
    100 to 300, 500, 700 and 900, which contradicts its formula; this is the formula.
    """
    n = torch.arange(iterations, device=first.device).view(-1, *([1] * first.dim()))
    return n * (total - first) // max(1, iterations - 1) + first


@dataclass(frozen=True)
class StructuredNoise(LikelihoodEstimator):
    """Over the inner iterations targets are masked from a random share up to all of them.

    The question stays clean. Each document draws its first timestep from 0 .. `total`; the rest are
    `spread_timesteps`. At t a share p_mask(t / total) of the targets is masked, and covered: at
    least one. Each covered token counts 1, so that the mean over the covered tokens, which the
    paper takes for a sequence, is a mean of log p(x_i | x without the masked) at that noise level.

    schedule  of the mask: linear for the paper; `Cosine()` masks images as MaskGIT does

    Source: arXiv:2505.15809 (MMaDA), section on UniGRPO; no code was released. Departure: the
    number of masked tokens is the expected one, not drawn, so that no view is empty.
    """

    total: int = 1000
    schedule: MaskSchedule = Linear()

    def __post_init__(self) -> None:
        self.check_counts("total")

    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[tuple[NoisyView, ...], ...]:
        """One view an iteration; a document has its own timesteps."""
        scored = scored_targets(batch, scored)
        device = scored.device
        first = torch.randint(self.total + 1, scored.shape, generator=generator, device=device)
        first = first.gather(1, batch.document.clamp_min(0))  # one a document
        views = []
        for t in spread_timesteps(first, iterations, self.total) / self.total:
            masked, _ = exact_count(
                scored,
                self.schedule.p_mask(t),
                torch.rand(t.shape, generator=generator, device=device),
                group=document_numbers(batch),
                t=t,
                nearest=True,
            )
            weight = torch.ones(t.shape, device=device)
            views.append((masked_view(batch, vocabulary, masked, scored, weight=weight),))
        return tuple(views)


@dataclass(frozen=True)
class Coupled(LikelihoodEstimator):
    """A mask and its complement, which cover each target once, and the full mask besides.

    With t ~ U(low, high) and each target in the mask M with probability t,

        1/2 log p(x_i | all masked) + 1/2 (1/t log p(x_i | x without M)          for i in M
                                           1/(1-t) log p(x_i | x without M's complement) else)

    The prompt stays clean. The mean is half of the fully masked log-probability, half of that at
    noise level t and half of that at 1 - t. The halves add up to 3/2, so that a log-ratio is half
    as large again as one token's own (at most 3 times): the clipping range should allow for it.

    Source: arXiv:2506.20639 (DiffuCoder), section on coupled-GRPO, and its published code for the
    average with the full mask and the range of t. Departure: t is drawn for each document, there
    for the whole batch.
    """

    low: float = 0.2
    high: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.low <= self.high < 1:
            raise ValueError(
                f"Coupled: 0 < low <= high < 1 is needed, got {self.low} and {self.high}"
            )

    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[tuple[NoisyView, ...], ...]:
        """Three views an iteration: everything masked, a mask, its complement."""
        scored = scored_targets(batch, scored)
        result = []
        for _ in range(iterations):
            u, draw = torch.rand((2, *scored.shape), generator=generator, device=scored.device)
            t = self.low + (self.high - self.low) * u.gather(1, batch.document.clamp_min(0))
            mask = scored & (draw < t)
            parts = ((scored, torch.ones_like(t)), (mask, t), (scored & ~mask, 1 - t))
            result.append(
                tuple(
                    masked_view(batch, vocabulary, masked, scored, weight=0.5 / share)
                    for masked, share in parts
                )
            )
        return tuple(result)


@dataclass(frozen=True)
class TrajectoryReplay(LikelihoodEstimator):
    """What a sampler did, step by step: sum over steps of log p(tokens committed | those before).

    Each view masks what was committed at a step or later, or never, and covers what was committed
    at it; `shrink` neighbouring steps of a row count as one, whose tokens are then taken for
    independent.

    With shrink = 1, at temperature 1 and without top-k, top-p, guidance, a cache or re-masking, it
    is the log-probability of the rollout, up to a constant, where the order does not look at the
    tokens that were drawn: with `Random`, which chooses positions without the model, and
    `LeftToRight`. So it is with `Margin` and `Entropy` without noise at the weights that sampled:
    their positions follow from the weights, and other weights might choose others. It is not with
    `Confidence` and `Probability`, nor with `Threshold` and the like: tokens are committed since
    they are likely, so that each rollout has a lower probability than this sum says, by what was
    drawn elsewhere and passed over. `with_order` counts that.

    views         so many of the merged steps an iteration, drawn without replacement, until all of
                  them have had their turn; None: all of them, each iteration
    with_order    the exact log-probability of a rollout with `Confidence` without noise, under a
                  commit rule that fixes the number of tokens, or `Threshold` over such a rule: see
                  `step_scores`. What was open and passed over is covered as well, so that logits
                  of all open positions of a block exist at once; take the ratio of the row
                  (`ClippedSurrogate(level="product")`) where it is to be exact
    block_length  with_order: that of the sampler, outside whose blocks nothing is passed over
    threshold     with_order: that of the sampler's `Threshold`; None: it has none

    Source: arXiv:2509.06949 (TraceRL); its code merges 8 steps for LLaDA. Departures: as
    many views as the longest row has steps, there each step is a training sample; `views` and
    `with_order` are ours.
    """

    shrink: int = 1
    views: int | None = None
    with_order: bool = False
    block_length: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        optional = [n for n in ("views", "block_length") if getattr(self, n) is not None]
        self.check_counts("shrink", *optional)
        if self.with_order and self.shrink > 1:
            raise ValueError(
                "TrajectoryReplay: with_order counts each step by itself; set shrink to 1, not "
                f"{self.shrink}"
            )
        for name in ("block_length", "threshold"):
            if getattr(self, name) is not None and not self.with_order:
                raise ValueError(
                    f"TrajectoryReplay: {name} {getattr(self, name)} is read only with with_order; "
                    "leave it out"
                )

    def check(self, sampler: Sampler) -> None:
        if sampler.remask is not None:
            raise ValueError(
                f"remask is {sampler.remask.eta}, but TrajectoryReplay replays tokens that stay; "
                "set it to 0, or take another estimator"
            )
        if not self.with_order:
            return
        if not isinstance(sampler.order, Confidence) or sampler.order.temperature:
            raise ValueError(
                "TrajectoryReplay: with_order knows only the probability of Confidence(), not that "
                f"of {sampler.order}; leave it out, which is exact for Random() and LeftToRight()"
            )
        for name, exact in (
            ("temperature", 1.0),
            ("top_k", None),
            ("top_p", None),
            ("guidance_scale", 1.0),
            ("cache", None),
            ("deprioritized_ids", ()),
            ("allow_mask_token", False),
            ("score_after_temperature", False),
            ("block_length", self.block_length),
        ):
            if getattr(sampler, name) != exact:
                raise ValueError(
                    f"TrajectoryReplay: with_order is exact only with {name} {exact!r}, but the "
                    f"sampler has {getattr(sampler, name)!r}; set it so, or leave with_order out"
                )
        rule: UnmaskingRule = sampler.unmasking
        threshold: float | None = None
        if isinstance(rule, Threshold) and not (rule.exclusive or rule.in_order or rule.distinct):
            threshold, rule = rule.threshold, rule.fallback
        if isinstance(rule, Parallel):
            raise ValueError(
                "TrajectoryReplay: with_order needs a number of tokens that does not depend on the "
                f"draw, or a plain Threshold, not {rule}; take one, or leave with_order out"
            )
        if threshold != self.threshold:
            raise ValueError(
                f"TrajectoryReplay: with_order is told of threshold {self.threshold}, but that of "
                f"the sampler is {threshold}; set them alike"
            )

    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[tuple[NoisyView, ...], ...]:
        """One view for each merged step; `steps` is needed."""
        if steps is None:
            raise ValueError(
                "TrajectoryReplay: it replays a rollout, and none was given; pass the steps of a "
                "sampler, or take another estimator"
            )
        committed = batch.target & (steps >= 0)
        scored = scored_targets(batch, scored)
        part = _rank(steps, committed) // self.shrink  # [B, L]
        # [B], 0 for a row with nothing to cover
        parts = part.masked_fill(~(scored & committed), -1).amax(1) + 1
        most = max(1, int(parts.max()))
        turn = torch.arange(most, device=part.device).expand(len(parts), -1)
        replay = partial(self._replay, batch, vocabulary, part, scored, parts)
        if self.views is None:
            return (replay(turn),) * iterations
        draw = torch.rand(turn.shape, generator=generator, device=part.device)
        order = draw.masked_fill(turn >= parts[:, None], 2.0).argsort(1)  # a row's own come first
        width = min(self.views, most)
        first = width * torch.arange(iterations, device=part.device)
        return tuple(
            replay(order.gather(1, (start + turn[:, :width]) % parts.clamp_min(1)[:, None]))
            for start in first
        )

    def _replay(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        part: Tensor,
        scored: Tensor,
        parts: Tensor,
        which: Tensor,
    ) -> tuple[NoisyView, ...]:
        """A view for each column of `which` [B, K], merged steps; a row with fewer idles."""
        views = []
        for j in range(which.shape[1]):
            step = which[:, j].masked_fill(j >= parts, -2)[:, None]  # [B, 1]
            masked = batch.target & ~((part >= 0) & (part < step))
            committed = batch.target & (part == step)
            covered = committed
            if self.with_order:
                covered = committed | (masked & self._in_block(batch, committed))
            covered = scored & covered
            views.append(
                NoisyView(
                    x_t=batch.ids.masked_fill(masked, vocabulary.mask_id),
                    covered=covered,
                    weight=covered.float(),
                    committed=committed if self.with_order else None,
                )
            )
        return tuple(views)

    def _in_block(self, batch: Batch, committed: Tensor) -> Tensor:
        """[B, L] bool, the targets of the block in which a step has committed something."""
        length = self.block_length or batch.ids.shape[1]
        block = (batch.target.cumsum(1) - 1) // length
        present = block.masked_fill(~committed, -1).amax(1, keepdim=True)  # [B, 1]
        return batch.target & (block == present)

    def score_pass(
        self,
        x_t: Tensor,
        *,
        denoiser: Denoiser,
        batch: Batch,
        views: Sequence[NoisyView],
        entropy: bool,
        undrawable: tuple[int, ...],
    ) -> tuple[Tensor, Tensor | None]:
        steps = [view.committed for view in views if view.committed is not None]
        if not steps:
            return super().score_pass(
                x_t,
                denoiser=denoiser,
                batch=batch,
                views=views,
                entropy=entropy,
                undrawable=undrawable,
            )
        return step_scores(
            denoiser,
            x_t,
            batch,
            committed=torch.cat(steps),
            covered=torch.cat([view.covered for view in views]),
            full_vocabulary=self.full_vocabulary,
            undrawable=undrawable,
            threshold=self.threshold,
            entropy=entropy,
        )


@dataclass(frozen=True)
class BlockRandom(LikelihoodEstimator):
    """A random block of the answer partly masked, what is behind it wholly, as a sampler has it.

    A view draws one of the answer's blocks of `block_length` targets, masks k of its m tokens,
    k ~ U{1 .. m}, and all targets behind it. What stands before it, the prompt included, is masked
    with probability `prompt_mask_prob`. All masked targets are covered, with weight n / (their
    number):
    the mean over the masked, times the n targets that are scored. The blocks of one iteration's
    views differ where there are enough. Rows hold one document.

    It is unbiased for its own mixture of noise levels, not for the bound.

    Source: arXiv:2510.09541 (SPG), its block-wise masking, and its published code, which covers the
    tokens behind the block as well, though it prepares a mask that would leave them out.
    """

    block_length: int = 32
    views: int = 2
    prompt_mask_prob: float = 0.15

    def __post_init__(self) -> None:
        self.check_counts("block_length", "views")
        self.check_probabilities("prompt_mask_prob")

    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[tuple[NoisyView, ...], ...]:
        """`views` views an iteration."""
        scored = scored_targets(batch, scored)
        block = (scored.cumsum(1) - 1) // self.block_length  # [B, L]
        number = scored.sum(1)
        blocks = ((number + self.block_length - 1) // self.block_length).clamp_min(1)  # [B]
        return tuple(
            self._views(batch, vocabulary, scored, block, blocks, generator)
            for _ in range(iterations)
        )

    def _views(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        scored: Tensor,
        block: Tensor,
        blocks: Tensor,
        generator: torch.Generator,
    ) -> tuple[NoisyView, ...]:
        device = scored.device
        key = torch.rand((len(scored), int(blocks.max())), generator=generator, device=device)
        beyond = torch.arange(key.shape[1], device=device) >= blocks[:, None]
        order = key.masked_fill(beyond, 2.0).argsort(1)  # a row's own blocks come first
        views = []
        for j in range(self.views):
            here = order.gather(1, (j % blocks)[:, None])  # [B, 1]
            u = torch.rand((len(scored), 1), generator=generator, device=device)
            share = (1 - u).expand(scored.shape)  # in (0, 1]: k is never 0
            draw, other = torch.rand((2, *scored.shape), generator=generator, device=device)
            within, _ = exact_count(
                scored & (block == here), share, draw, group=document_numbers(batch), t=share
            )
            before = maskable(batch) & ~batch.target | scored & (block < here)
            hidden = before & (other < self.prompt_mask_prob)
            masked = within | scored & (block > here) | hidden & scored
            weight = scored.sum(1, keepdim=True) / masked.sum(1, keepdim=True).clamp_min(1)
            views.append(
                masked_view(
                    batch,
                    vocabulary,
                    masked,
                    scored,
                    weight=weight.expand(scored.shape) / self.views,
                    hidden=hidden,
                )
            )
        return tuple(views)


def _rank(steps: Tensor, where: Tensor) -> Tensor:
    """[B, L]: how many different steps of the row come before a token's own; -1 elsewhere."""
    ordered, order = steps.masked_fill(~where, torch.iinfo(steps.dtype).max).sort(dim=1)
    rank = F.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(1), (1, 0))
    return torch.empty_like(rank).scatter(1, order, rank).masked_fill(~where, -1)
