"""Score the open positions: those of highest score are unmasked first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """The M open positions of one modality and the token drawn for each.

    Attributes:
        logits: [M, R] float32, guided, without deprioritized ids, and before temperature, top-k and
            top-p unless the sampler's `score_after_temperature` is set.
        log_prob: [M] log softmax(logits) of the drawn token.
        column: [M] position in the row.
        step: [M] as in `Progress`.
        steps: [M] as in `Progress`.
    """

    logits: Tensor
    log_prob: Tensor
    column: Tensor
    step: Tensor
    steps: Tensor

    def some(self, which: slice) -> Candidates:
        """Return a run of the candidates."""
        return Candidates(**{f.name: getattr(self, f.name)[which] for f in fields(self)})


class Order(ABC):
    """Score the candidates; those of highest score are committed first.

    An order of one's own is a frozen dataclass with `score`, whose class path stands for it:
    `order: my_module.MyOrder` in YAML, `--order my_module.MyOrder` on the command line.
    """

    @abstractmethod
    def score(self, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        """Score each candidate.

        Args:
            candidates: Of one modality; scores of both modalities are compared with each other.
            generator: The only source of random numbers, so that the result follows from the seed.

        Returns:
            [M], of any dtype; the sampler compares scores in float64.
        """

    def read(self, part: Candidates) -> Tensor:
        """Return what `scores` needs of the logits of m candidates: [m, ...]; here all of them.

        The sampler keeps this and no logits, so that an order which needs little takes little
        memory. It draws no random numbers.
        """
        return part.logits

    def scores(self, read: Tensor, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        """Score candidates without logits, from what `read` [M, ...] returned for all of them."""
        return self.score(replace(candidates, logits=read), generator=generator)


@dataclass(frozen=True)
class Ranked(Order):
    """Order by a number that the model gives each candidate, optionally with Gumbel noise.

    Attributes:
        temperature: Of the noise. Constant, it draws the positions without replacement from
            softmax(value / temperature), as Dream's alg_temp does.
        decay: "linear": temperature * (1 - (step + 1) / steps), to zero at the last step of a block
            (MaskGIT). "none": it stays (Lumina-DiMOO, Dream). "compounding" multiplies the linear
            factors from step to step, as Show-o and MMaDA do; only to reproduce their results.
    """

    temperature: float = 0.0
    decay: Literal["linear", "compounding", "none"] = "linear"

    @abstractmethod
    def value(self, candidates: Candidates) -> Tensor:
        """Return a number for each candidate, [M]; higher is surer."""

    def score(self, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        """Score each candidate, see `Order.score`."""
        return self._noised(self.value(candidates), candidates, generator)

    def read(self, part: Candidates) -> Tensor:
        """Return what `scores` needs, see `Order.read`."""
        return self.value(part) if self._scores_as_here else super().read(part)

    def scores(self, read: Tensor, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        """Score candidates without logits, see `Order.scores`."""
        if self._scores_as_here:
            return self._noised(read, candidates, generator)
        return super().scores(read, candidates, generator=generator)

    @property
    def _scores_as_here(self) -> bool:
        """Whether `score` is not that of a subclass, which may read anything."""
        return type(self).score is Ranked.score

    def _noised(self, value: Tensor, candidates: Candidates, generator: torch.Generator) -> Tensor:
        score = value.double()
        if self.temperature == 0.0:
            return score
        return score + self.temperature * self._decay(candidates) * gumbel_like(score, generator)

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
    """Order by the log-probability of the drawn token (LLaDA's low-confidence re-masking, MaskGIT).

    Source: arXiv:2202.04200, section 3.2; noise: its published code.
    """

    def value(self, candidates: Candidates) -> Tensor:
        """Return the number, see `Ranked.value`."""
        return candidates.log_prob


@dataclass(frozen=True)
class Probability(Ranked):
    """Order by the probability of the drawn token; differs from `Confidence` by noise (Dream)."""

    def value(self, candidates: Candidates) -> Tensor:
        """Return the number, see `Ranked.value`."""
        return candidates.log_prob.exp()


@dataclass(frozen=True)
class Margin(Ranked):
    """Order by the gap between the two most likely tokens.

    Source: arXiv:2502.06768, section 4.1.
    """

    def value(self, candidates: Candidates) -> Tensor:
        """Return the number, see `Ranked.value`."""
        log_z = candidates.logits.logsumexp(-1, keepdim=True)
        best = candidates.logits.topk(min(2, candidates.logits.shape[-1]), dim=-1).values
        probability = (best - log_z).exp()
        return probability[:, 0] - probability[:, 1:].sum(-1)


@dataclass(frozen=True)
class Entropy(Ranked):
    """Order by entropy, least first.

    Source: arXiv:2508.15487 (Dream), decoding strategies.
    """

    def value(self, candidates: Candidates) -> Tensor:
        """Return the number, see `Ranked.value`."""
        return -torch.special.entr(candidates.logits.softmax(-1)).sum(-1)


@dataclass(frozen=True)
class Random(Order):
    """Order uniformly at random, as the ancestral sampler does."""

    def score(self, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        """Score each candidate, see `Order.score`."""
        like = candidates.log_prob
        return torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float64)

    def read(self, part: Candidates) -> Tensor:
        """Return what `scores` needs, see `Order.read`."""
        return part.logits.new_empty(len(part.logits), 0)  # a view would keep the logits


@dataclass(frozen=True)
class LeftToRight(Order):
    """Order as a text is read."""

    def score(self, candidates: Candidates, *, generator: torch.Generator) -> Tensor:
        """Score each candidate, see `Order.score`."""
        return -candidates.column.double()

    def read(self, part: Candidates) -> Tensor:
        """Return what `scores` needs, see `Order.read`."""
        return part.logits.new_empty(len(part.logits), 0)  # a view would keep the logits


def gumbel_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard Gumbel noise of the shape of `like`, float64."""
    u = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float64)
    return u.log_().neg_().log_().neg_()
