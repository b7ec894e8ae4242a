"""How likely a denoiser holds the targets of a batch to be.

An estimator draws views of a batch, which are noisy copies of it, and says how much the clean
tokens of each count. The same views serve a policy, the policy it was and the reference, so that
their log-probabilities differ by what the networks think and not by what was masked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.cross_entropy import linear_log_prob
from mmdlm.core.denoiser import Denoiser
from mmdlm.core.forward import exact_count
from mmdlm.core.schedule import Linear, MaskSchedule
from mmdlm.core.sequence import Batch, concatenate
from mmdlm.core.vocabulary import GENERATED, Modality, Vocabulary


@dataclass(frozen=True)
class View:
    """One noisy look at a batch; all [B, L].

    x_t      int64, noisy ids
    covered  bool, the targets whose log-probability this view gives
    weight   float32, how much that counts in the estimate; 0 where nothing is covered
    """

    x_t: Tensor
    covered: Tensor
    weight: Tensor


@dataclass(frozen=True)
class TokenScores:
    """What a denoiser says of the covered tokens of K views; all [K, B, L], 0 where not covered.

    log_prob  of the clean token, in nats, differentiable; not weighted
    covered   bool, as in `View`
    weight    as in `View`
    entropy   of the distribution that the clean token was looked up in, without gradient; or None
    """

    log_prob: Tensor
    covered: Tensor
    weight: Tensor
    entropy: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """[B, L], the weighted sum over the views: the estimate, token by token."""
        return (self.weight * self.log_prob).sum(0)

    @property
    def anywhere(self) -> Tensor:
        """[B, L] bool, targets that some view covers."""
        return self.covered.any(0)

    def detach(self) -> TokenScores:
        """The same without gradient, to keep as those of the old policy."""
        return replace(self, log_prob=self.log_prob.detach())


@dataclass(frozen=True)
class LikelihoodEstimator(ABC):
    """An estimate of log p(target tokens | context), token by token.

    at_once          views a forward pass takes
    full_vocabulary  log-probabilities over all ids, not over the range of the position's modality
    """

    at_once: int = field(default=1, kw_only=True)
    full_vocabulary: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self._check_counts("at_once")

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
    ) -> tuple[tuple[View, ...], ...]:
        """The views of each of several passes over one batch (inner iterations).

        scored  [B, L] bool, targets to be covered; the others, which stand behind an answer's end,
                stay masked, so that no view gives its length away. Default: all targets
        steps   [B, L] int64, the step at which a sampler committed each target, -1 for never
        """

    def scores(
        self, denoiser: Denoiser, batch: Batch, views: Sequence[View], *, entropy: bool = False
    ) -> TokenScores:
        """What the denoiser says of the covered tokens of each view."""
        log_probs: list[Tensor] = []
        entropies: list[Tensor] = []
        for start in range(0, len(views), self.at_once):
            part = views[start : start + self.at_once]
            values, spread = token_scores(
                denoiser,
                torch.cat([view.x_t for view in part]),
                concatenate([batch] * len(part)) if len(part) > 1 else batch,
                where=torch.cat([view.covered for view in part]),
                full_vocabulary=self.full_vocabulary,
                entropy=entropy,
            )
            log_probs += values.split(len(batch))
            entropies += [] if spread is None else spread.split(len(batch))
        return TokenScores(
            log_prob=torch.stack(log_probs),
            covered=torch.stack([view.covered for view in views]),
            weight=torch.stack([view.weight for view in views]),
            entropy=torch.stack(entropies) if entropies else None,
        )

    def log_prob(self, denoiser: Denoiser, batch: Batch, views: Sequence[View]) -> Tensor:
        """[B, L] in nats, the weighted sum over the views; 0 where nothing is covered."""
        return self.scores(denoiser, batch, views).total

    def __call__(self, denoiser: Denoiser, batch: Batch, *, generator: torch.Generator) -> Tensor:
        """[B, L] in nats, 0 where nothing is a target; differentiable.

        The sum over a document is its log-likelihood, or a bound or a surrogate of it.
        """
        (views,) = self.draw(batch, denoiser.vocabulary, generator=generator)
        return self.log_prob(denoiser, batch, views)

    def _check_counts(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be at least 1, got {getattr(self, name)}"
                )

    def _check_probabilities(self, *names: str) -> None:
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
        self._check_counts("repeats", "strata", "masks", "at_once")

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
    ) -> tuple[tuple[View, ...], ...]:
        """Independent counts and sets for each iteration."""
        scored = _scored(batch, scored)
        return tuple(
            tuple(
                _view(batch, vocabulary, masked, scored, weight=1 / (self._number * share))
                for many, shares in self._sets(batch, scored, generator)
                for masked, share in zip(
                    many.split(len(batch)), shares.split(len(batch)), strict=True
                )
            )
            for _ in range(iterations)
        )

    def __call__(self, denoiser: Denoiser, batch: Batch, *, generator: torch.Generator) -> Tensor:
        total = sum(self._draws(denoiser, batch, generator), torch.zeros(()))
        return total / self._number

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
class MeanField(LikelihoodEstimator):
    """All targets masked at once, one forward pass: log p(x) ~ sum_i log p(x_i | context).

    Each token of the context is masked, too, with probability `p_context`, drawn anew in each
    iteration: several updates on one batch then see different contexts. Structure (CONTROL) and
    feature slots stay. With p_context = 0 it is exact for one step of sampling that commits all
    targets, and for a model that looks at no target, and no bound otherwise.

    Source: arXiv:2504.12216 (d1), section on diffu-GRPO; 0.15 in its runs, 0.3 in its code's
    defaults. Departures from the code: there the micro-step chooses the seed of a mask, so that
    with accumulation each micro-batch sees half of the seeds, each twice, and the global generator
    is reseeded; left padding is attended to; special ids of the prompt are masked as well.
    """

    p_context: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_probabilities("p_context")

    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[tuple[View, ...], ...]:
        """One view an iteration."""
        scored = _scored(batch, scored)
        weight = torch.ones(scored.shape, device=scored.device)
        return tuple(
            (
                _view(
                    batch,
                    vocabulary,
                    scored,
                    scored,
                    weight=weight,
                    hidden=_some_context(batch, self.p_context, generator),
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
class Structured(LikelihoodEstimator):
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
        self._check_counts("at_once", "total")

    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[tuple[View, ...], ...]:
        """One view an iteration; a document has its own timesteps."""
        scored = _scored(batch, scored)
        device = scored.device
        first = torch.randint(self.total + 1, scored.shape, generator=generator, device=device)
        first = first.gather(1, batch.document.clamp_min(0))  # one a document
        views = []
        for t in spread_timesteps(first, iterations, self.total) / self.total:
            masked, _ = exact_count(
                scored,
                self.schedule.p_mask(t),
                torch.rand(t.shape, generator=generator, device=device),
                group=_documents(batch),
                t=t,
                nearest=True,
            )
            weight = torch.ones(t.shape, device=device)
            views.append((_view(batch, vocabulary, masked, scored, weight=weight),))
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
    ) -> tuple[tuple[View, ...], ...]:
        """Three views an iteration: everything masked, a mask, its complement."""
        scored = _scored(batch, scored)
        result = []
        for _ in range(iterations):
            u, draw = torch.rand((2, *scored.shape), generator=generator, device=scored.device)
            t = self.low + (self.high - self.low) * u.gather(1, batch.document.clamp_min(0))
            mask = scored & (draw < t)
            parts = ((scored, torch.ones_like(t)), (mask, t), (scored & ~mask, 1 - t))
            result.append(
                tuple(
                    _view(batch, vocabulary, masked, scored, weight=0.5 / share)
                    for masked, share in parts
                )
            )
        return tuple(result)


@dataclass(frozen=True)
class Trace(LikelihoodEstimator):
    """What a sampler did, step by step: sum over steps of log p(tokens committed | those before).

    Each view masks what was committed at a step or later, or never, and covers what was committed
    at it; `shrink` neighbouring steps of a row count as one. With shrink = 1 it is exactly the
    log-probability of the tokens given the order in which they were committed, at temperature 1 and
    without guidance or re-masking; a larger one treats the merged tokens as independent.

    views  so many of the merged steps an iteration, drawn without replacement, until all of them
           have had their turn; None: all of them, each iteration

    Source: arXiv:2509.06949 (TraceRL); its code merges 8 steps for LLaDA. Departures: as
    many views as the longest row has steps, there each step is a training sample; `views` is ours.
    """

    shrink: int = 1
    views: int | None = None

    def __post_init__(self) -> None:
        self._check_counts("at_once", "shrink", *(() if self.views is None else ("views",)))

    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[tuple[View, ...], ...]:
        """One view for each merged step; `steps` is needed."""
        if steps is None:
            raise ValueError(
                "Trace: it replays a rollout, and none was given; pass the steps of a sampler, or "
                "take another estimator"
            )
        committed = batch.target & (steps >= 0)
        scored = _scored(batch, scored) & committed
        part = _rank(steps, committed) // self.shrink  # [B, L]
        parts = part.masked_fill(~scored, -1).amax(1) + 1  # [B], 0 for a row with nothing to cover
        most = max(1, int(parts.max()))
        turn = torch.arange(most, device=part.device).expand(len(parts), -1)
        if self.views is None:
            return (self._replay(batch, vocabulary, part, scored, parts, turn),) * iterations
        draw = torch.rand(turn.shape, generator=generator, device=part.device)
        order = draw.masked_fill(turn >= parts[:, None], 2.0).argsort(1)  # a row's own come first
        width = min(self.views, most)
        first = width * torch.arange(iterations, device=part.device)
        return tuple(
            self._replay(
                batch,
                vocabulary,
                part,
                scored,
                parts,
                order.gather(1, (start + turn[:, :width]) % parts.clamp_min(1)[:, None]),
            )
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
    ) -> tuple[View, ...]:
        """A view for each column of `which` [B, K], merged steps; a row with fewer idles."""
        views = []
        for j in range(which.shape[1]):
            step = which[:, j].masked_fill(j >= parts, -2)[:, None]  # [B, 1]
            masked = batch.target & ~((part >= 0) & (part < step))
            covered = scored & (part == step)
            views.append(
                View(
                    x_t=batch.ids.masked_fill(masked, vocabulary.mask_id),
                    covered=covered,
                    weight=covered.float(),
                )
            )
        return tuple(views)


@dataclass(frozen=True)
class BlockRandom(LikelihoodEstimator):
    """A random block of the answer partly masked, what is behind it wholly, as a sampler has it.

    A view draws one of the answer's blocks of `block_length` targets, masks k of its m tokens,
    k ~ U{1 .. m}, and all targets behind it. What stands before it, the prompt included, is masked
    with probability `p_context`. All masked targets are covered, with weight n / (their number):
    the mean over the masked, times the n targets that are scored. The blocks of one iteration's
    views differ where there are enough. Rows hold one document.

    It is unbiased for its own mixture of noise levels, not for the bound.

    Source: arXiv:2510.09541 (SPG), its block-wise masking, and its published code, which covers the
    tokens behind the block as well, though it prepares a mask that would leave them out.
    """

    block_length: int = 32
    views: int = 2
    p_context: float = 0.15

    def __post_init__(self) -> None:
        self._check_counts("at_once", "block_length", "views")
        self._check_probabilities("p_context")

    def draw(
        self,
        batch: Batch,
        vocabulary: Vocabulary,
        *,
        generator: torch.Generator,
        iterations: int = 1,
        scored: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> tuple[tuple[View, ...], ...]:
        """`views` views an iteration."""
        scored = _scored(batch, scored)
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
    ) -> tuple[View, ...]:
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
                scored & (block == here), share, draw, group=_documents(batch), t=share
            )
            before = _maskable(batch) & ~batch.target | scored & (block < here)
            hidden = before & (other < self.p_context)
            masked = within | scored & (block > here) | hidden & scored
            weight = scored.sum(1, keepdim=True) / masked.sum(1, keepdim=True).clamp_min(1)
            views.append(
                _view(
                    batch,
                    vocabulary,
                    masked,
                    scored,
                    weight=weight.expand(scored.shape) / self.views,
                    hidden=hidden,
                )
            )
        return tuple(views)


# ---- views --------------------------------------------------------------------------------------


def _scored(batch: Batch, scored: Tensor | None) -> Tensor:
    return batch.target if scored is None else batch.target & scored


def _view(
    batch: Batch,
    vocabulary: Vocabulary,
    masked: Tensor,
    scored: Tensor,
    *,
    weight: Tensor,
    hidden: Tensor | None = None,
) -> View:
    """Covers the masked; what is not scored is masked, too, and so is `hidden` context."""
    gone = masked | (batch.target & ~scored)
    if hidden is not None:
        gone = gone | hidden
    return View(
        x_t=batch.ids.masked_fill(gone, vocabulary.mask_id),
        covered=masked,
        weight=torch.where(masked, weight, 0.0),
    )


def _documents(batch: Batch) -> Tensor:
    """[B, L] a number for each document of the batch."""
    row = torch.arange(len(batch), device=batch.ids.device)[:, None]
    return row * batch.ids.shape[1] + batch.document


def _maskable(batch: Batch) -> Tensor:
    """[B, L] bool: text and image codes, not structure, padding or slots."""
    return (batch.of(Modality.TEXT) | batch.of(Modality.IMAGE)) & ~batch.is_padding


def _some_context(batch: Batch, p: float, generator: torch.Generator) -> Tensor:
    """[B, L] bool, context tokens, each with probability p."""
    draw = torch.rand(batch.ids.shape, generator=generator, device=batch.ids.device)
    return _maskable(batch) & ~batch.target & (draw < p)


def _rank(steps: Tensor, where: Tensor) -> Tensor:
    """[B, L]: how many different steps of the row come before a token's own; -1 elsewhere."""
    ordered, order = steps.masked_fill(~where, torch.iinfo(steps.dtype).max).sort(dim=1)
    rank = F.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(1), (1, 0))
    return torch.empty_like(rank).scatter(1, order, rank).masked_fill(~where, -1)


# ---- log-probabilities --------------------------------------------------------------------------


def token_log_prob(
    denoiser: Denoiser, x_t: Tensor, batch: Batch, *, where: Tensor, full_vocabulary: bool = False
) -> Tensor:
    """log p(x_0 | x_t) of the clean tokens at the positions `where`, 0 elsewhere; [B, L] float32.

    Logits are restricted to the id range of each position's modality unless `full_vocabulary`.
    """
    return token_scores(denoiser, x_t, batch, where=where, full_vocabulary=full_vocabulary)[0]


def token_scores(
    denoiser: Denoiser,
    x_t: Tensor,
    batch: Batch,
    *,
    where: Tensor,
    full_vocabulary: bool = False,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`token_log_prob`, and where asked the entropy at the same positions, without gradient."""
    hidden = denoiser.hidden(x_t, batch, at=where)
    head, something = denoiser.head_weight(), bool(where.any())
    result = torch.zeros(x_t.shape, device=x_t.device)
    spread = torch.zeros(x_t.shape, device=x_t.device) if entropy else None
    for modality in GENERATED:
        start, stop = denoiser.vocabulary.range(modality)
        if start == stop:
            continue
        ids = (0, denoiser.vocabulary.size) if full_vocabulary else (start, stop)
        here = where & batch.of(modality)
        label = batch.ids[here] - ids[0]
        if not len(label) and something:  # its gradients, all zero, are as large as the head
            continue
        if head is not None:
            found = linear_log_prob(hidden[here], head, label, ids=ids, entropy=entropy)
        else:
            found = _log_prob(denoiser.logits_at(hidden, here, ids=ids), label, entropy=entropy)
        log_prob, value = found
        result = result.masked_scatter(here, log_prob)
        if spread is not None and value is not None:
            spread = spread.masked_scatter(here, value)
    return result, spread


def _log_prob(logits: Tensor, label: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """`linear_log_prob` of logits [M, R]."""
    logits = logits.float()
    log_prob = -F.cross_entropy(logits, label, reduction="none")
    if not entropy:
        return log_prob, None
    return log_prob, torch.special.entr(logits.detach().softmax(-1)).sum(-1)
