"""Replay of a sampler's trajectory, step by step (TraceRL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.noisy_view import (
    NoisyView,
    scored_targets,
)
from mmdlm.core.likelihood.order_probability import step_scores
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import Confidence
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import Parallel, Threshold, UnmaskingRule
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class TrajectoryReplay(LikelihoodEstimator):
    """What a sampler did, step by step: sum over steps of log p(tokens committed | those before).

    Each view masks what was committed at a step or later, or never, and covers what was committed
    at it; `shrink` neighboring steps of a row count as one, whose tokens are then taken for
    independent.

    With shrink = 1, at temperature 1 and without top-k, top-p, guidance, a cache or re-masking, it
    is the log-probability of the rollout, up to a constant, where the order does not look at the
    tokens that were drawn: with `Random`, which chooses positions without the model, and
    `LeftToRight`. So it is with `Margin` and `Entropy` without noise at the weights that sampled:
    their positions follow from the weights, and other weights might choose others. It is not with
    `Confidence` and `Probability`, nor with `Threshold` and the like: tokens are committed since
    they are likely, so that each rollout has a lower probability than this sum says, by what was
    drawn elsewhere and passed over. `with_order` counts that.

    Attributes:
        views: So many of the merged steps an iteration, drawn without replacement, until all of
            them have had their turn; None: all of them, each iteration.
        with_order: The exact log-probability of a rollout with `Confidence` without noise, under a
            commit rule that fixes the number of tokens, or `Threshold` over such a rule: see
            `step_scores`. What was open and passed over is covered as well, so that logits of all
            open positions of a block exist at once; take the ratio of the row
            (`ClippedSurrogate(level="product")`) where it is to be exact.
        block_length: with_order: that of the sampler, outside whose blocks nothing is passed over.
        threshold: with_order: that of the sampler's `Threshold`; None: it has none.

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
            ("guidance", ClassifierFreeGuidance()),
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
        """Return a view for each column of `which` [B, K], merged steps; shorter rows idle."""
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


def _rank(steps: Tensor, where: Tensor) -> Tensor:
    """[B, L]: how many different steps of the row come before a token's own; -1 elsewhere."""
    ordered, order = steps.masked_fill(~where, torch.iinfo(steps.dtype).max).sort(dim=1)
    rank = F.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(1), (1, 0))
    return torch.empty_like(rank).scatter(1, order, rank).masked_fill(~where, -1)
