"""Noisy looks at a batch: what a likelihood estimator draws, and the parts to make one from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Modality, Vocabulary


@dataclass(frozen=True)
class NoisyView:
    """One noisy look at a batch; all [B, L].

    Attributes:
        x_t: int64, noisy ids.
        covered: bool, the targets whose log-probability this view gives.
        weight: float32, how much that counts in the estimate; 0 where nothing is covered.
        committed: bool, where the view is a step of a sampler whose order counts: the targets that
            the step committed. What is covered besides was open, and was passed over. None: the
            order does not count.
    """

    x_t: Tensor
    covered: Tensor
    weight: Tensor
    committed: Tensor | None = None


def masked_view(
    batch: Batch,
    vocabulary: Vocabulary,
    masked: Tensor,
    scored: Tensor,
    *,
    weight: Tensor,
    hidden: Tensor | None = None,
) -> NoisyView:
    """Return the view that masks some targets and covers them.

    Args:
        batch: Clean ids and targets.
        vocabulary: Gives the mask token.
        masked: [B, L] bool, the scored targets to mask and cover.
        scored: [B, L] bool, see `scored_targets`; all other targets are masked as well, and not
            covered.
        weight: [B, L], how much each covered target counts.
        hidden: [B, L] bool, what else is masked and not covered, such as context.

    Returns:
        Its x_t has the mask token at `masked`, `hidden` and the targets outside `scored`.
    """
    gone = masked | (batch.target & ~scored)
    if hidden is not None:
        gone = gone | hidden
    return NoisyView(
        x_t=batch.ids.masked_fill(gone, vocabulary.mask_id),
        covered=masked,
        weight=torch.where(masked, weight, 0.0),
    )


def scored_targets(batch: Batch, scored: Tensor | None) -> Tensor:
    """Return the targets [B, L] that may be covered: those that are `scored`, by default all."""
    return batch.target if scored is None else batch.target & scored


def document_numbers(batch: Batch) -> Tensor:
    """Return a number [B, L] for each document of the batch."""
    row = torch.arange(len(batch), device=batch.ids.device)[:, None]
    return row * batch.ids.shape[1] + batch.document


def maskable(batch: Batch) -> Tensor:
    """Return where text and image codes are, [B, L] bool: not structure, padding or slots."""
    return (batch.of(Modality.TEXT) | batch.of(Modality.IMAGE)) & ~batch.is_padding


def some_context(batch: Batch, p: float, generator: torch.Generator) -> Tensor:
    """Draw context tokens, [B, L] bool, each with probability p."""
    draw = torch.rand(batch.ids.shape, generator=generator, device=batch.ids.device)
    return maskable(batch) & ~batch.target & (draw < p)
