"""How likely a denoiser holds the targets of a batch to be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.forward import exact_count
from mmdlm.core.sequence import Batch, concatenate
from mmdlm.core.vocabulary import GENERATED


class LikelihoodEstimator(ABC):
    """An estimate of log p(target tokens | context), token by token."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, batch: Batch, *, generator: torch.Generator) -> Tensor:
        """[B, L] in nats, 0 where nothing is a target; differentiable.

        The sum over a document is its log-likelihood, or a bound of it.
        """


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
    which are independent. One forward pass takes `at_once` draws of the whole batch.

    Source: arXiv:2502.09992, appendix B.5 and its published evaluation (128 draws: 8 x 16).
    """

    repeats: int = 8
    strata: int = 16
    at_once: int = 1
    full_vocabulary: bool = False

    def __post_init__(self) -> None:
        for name in ("repeats", "strata", "at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"Elbo: {name} must be at least 1, got {getattr(self, name)}")

    def __call__(self, denoiser: Denoiser, batch: Batch, *, generator: torch.Generator) -> Tensor:
        total = sum(self._draws(denoiser, batch, generator), torch.zeros(()))
        return total / (self.repeats * self.strata)

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
        means = -draws.unflatten(0, (self.repeats, self.strata)).mean(1)  # [repeats, B, L]
        return Nelbo(
            value=means.mean(0),
            standard_error=means.std(0) / self.repeats**0.5,
            tokens=torch.zeros_like(document).scatter_add(1, document, batch.target.long()),
        )

    def _draws(
        self, denoiser: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """`repeats` x `strata` unbiased estimates [B, L], repeat by repeat."""
        document = batch.document.clamp_min(0)
        device = document.device
        offset = torch.rand((self.repeats, *document.shape), generator=generator, device=device)
        times = [
            1 - (u.gather(1, document) + s / self.strata) % 1.0  # in (0, 1]: k is never 0
            for u in offset
            for s in range(self.strata)
        ]
        for start in range(0, len(times), self.at_once):
            t = torch.cat(times[start : start + self.at_once])  # [copies * B, L]
            copies = concatenate([batch] * (len(t) // len(batch)))
            yield from self._estimate(denoiser, copies, t, generator).split(len(batch))

    def _estimate(
        self, denoiser: Denoiser, batch: Batch, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        row = torch.arange(len(batch), device=t.device)[:, None]
        masked, share = exact_count(
            batch.target,
            t,
            torch.rand(t.shape, generator=generator, device=t.device),
            group=row * t.shape[1] + batch.document,
            t=t,
        )
        x_t = batch.ids.masked_fill(masked, denoiser.vocabulary.mask_id)
        log_prob = token_log_prob(
            denoiser, x_t, batch, where=masked, full_vocabulary=self.full_vocabulary
        )
        return log_prob / share


def token_log_prob(
    denoiser: Denoiser, x_t: Tensor, batch: Batch, *, where: Tensor, full_vocabulary: bool = False
) -> Tensor:
    """log p(x_0 | x_t) of the clean tokens at the positions `where`, 0 elsewhere; [B, L] float32.

    Logits are restricted to the id range of each position's modality unless `full_vocabulary`.
    """
    hidden = denoiser.hidden(x_t, batch)
    result = torch.zeros(x_t.shape, device=x_t.device)
    for modality in GENERATED:
        ids = denoiser.vocabulary.range(modality)
        if ids[0] == ids[1]:
            continue
        here = where & batch.of(modality)
        logits = denoiser.logits_at(hidden, here, ids=None if full_vocabulary else ids).float()
        label = batch.ids[here] - (0 if full_vocabulary else ids[0])
        log_prob = -F.cross_entropy(logits, label, reduction="none")
        result = result.masked_scatter(here, log_prob)
    return result
