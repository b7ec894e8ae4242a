"""Estimators of log p(target given context) for RL and evaluation: the contract.

An estimator draws views of a batch, which are noisy copies of it, and scores the clean tokens that
each view covers. The same views serve the policy, the policy before its update and the reference,
so that their log-probabilities differ by the networks and not by the masks.

An estimator of your own is a frozen dataclass with `draw`, which makes its views with
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.likelihood.noisy_view import (
    NoisyView,
)
from mmdlm.core.likelihood.token_scores import TokenScores, token_scores
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import Batch, concatenate
from mmdlm.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class LikelihoodEstimator(ABC):
    """An estimate of log p(target tokens | context), token by token.

    Attributes:
        at_once: Views a forward pass takes.
        kept_passes: Forward passes whose activations are kept for the gradient, at least 1. Those
            of all others are computed once more while it is taken, one pass at a time, so that
            memory does not grow with the number of views; it takes up to a third longer. Raise it
            where all fit into memory.
        full_vocabulary: Log-probabilities over all ids, not over the range of the position's
            modality.
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
        """Draw the views of each of several passes over one batch (inner iterations).

        Args:
            batch: Clean ids and targets.
            vocabulary: Gives the mask token.
            generator: Random numbers.
            iterations: Number of passes.
            scored: [B, L] bool, targets to be covered; the others, which stand behind an answer's
                end, stay masked, so that no view gives its length away. Default: all targets.
            steps: [B, L] int64, the step at which a sampler committed each target, -1 for never.

        Returns:
            For each pass its views.
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

        Returns:
            Log-probabilities, coverage and weights, [views, B, L] each.
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
