"""The training objective: draw times and noise, then sum the loss of each modality."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmdlm.core.blocks import (
    PromptBlocks,
    check_blocks,
    hidden_beside_clean,
    in_blocks,
    own_blocks,
)
from mmdlm.core.denoiser import Denoiser, SharingDenoiser
from mmdlm.core.diffusion.forward import Corruption, ForwardProcess
from mmdlm.core.losses.fused_cross_entropy import linear_cross_entropy
from mmdlm.core.losses.normalization import OBJECTIVE, LossNormalization, check_normalization
from mmdlm.core.losses.timesteps import StratifiedTimesteps, Timesteps
from mmdlm.core.losses.token_losses import TokenLoss, Tokens, WeightedCrossEntropy
from mmdlm.core.losses.weighting import Bound, Weighting
from mmdlm.core.sequence import Batch, concatenate
from mmdlm.core.vocabulary import Modality, Vocabulary


@dataclass(frozen=True)
class ModalityLoss:
    """Sum a loss over the covered tokens of one modality, and say what the sum is divided by.

    Args:
        loss: The loss of each covered token.
        loss_normalization: What the sum is divided by. "token": all target tokens, which gives nats
            per token (LLaDA's pretraining). "masked_token": the covered tokens, a plain mean
            (MMaDA's images). "sequence": each document's own target tokens, then the number of
            documents, so that a short answer counts as much as a long one (LLaDA's fine-tuning).
            "batch": the number of documents, which gives nats per document.
        weighting: The weight of each token, for the losses that have weights.
    """

    loss: TokenLoss = WeightedCrossEntropy()
    loss_normalization: LossNormalization = "token"
    weighting: Weighting = Bound()

    def __post_init__(self) -> None:
        check_normalization(self.loss_normalization, OBJECTIVE, "ModalityLoss")

    def count(self, batch: Batch, loss_mask: Tensor) -> Tensor:
        """Return the denominator, a scalar int64, over the targets that `batch` has."""
        if self.loss_normalization == "token":
            return batch.target.sum()
        if self.loss_normalization == "masked_token":
            return loss_mask.sum()
        return (_targets_of_document(batch) > 0).sum()

    def divisor(self, batch: Batch) -> Tensor | None:
        """[B, L] what each token's loss is divided by before it is summed; None for 1."""
        if self.loss_normalization != "sequence":
            return None
        return _targets_of_document(batch).gather(1, batch.document.clamp_min(0))


@dataclass(frozen=True)
class LossTerms:
    """Sums and counts by modality ("text", "image"), never means.

    The training loop divides once, after it has added the counts of all processes and accumulation
    steps. Sums carry gradient.
    """

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """What a training step minimizes.

    Attributes:
        process: The forward process, one for all or `PerModality`.
        text: Token loss and normalization of each modality.
        image: Token loss and normalization of each modality.
        times: How times are drawn.
        complementary: Every document twice, the second copy with the complementary mask, so that
            each target is covered once; twice the rows.
        full_vocabulary: Logits over all ids, not over the range of the position's modality.
        block_lengths: Block diffusion with blocks of one of these lengths, drawn for each batch:
            every token sees the clean blocks before its own. Empty: with those of the model, if it
            has some.
        prompt_blocks: What stands before the first target, for `block_lengths`; see
            `mmdlm.core.blocks.block_numbers`.
    """

    process: ForwardProcess
    text: ModalityLoss = ModalityLoss()
    image: ModalityLoss = ModalityLoss()
    times: Timesteps = StratifiedTimesteps()
    complementary: bool = False
    full_vocabulary: bool = False
    block_lengths: tuple[int, ...] = ()
    prompt_blocks: PromptBlocks = "blocks"

    def __post_init__(self) -> None:
        for length in self.block_lengths:
            check_blocks(length, self.prompt_blocks)
        for _, modality, loss in self._parts():
            process = self.process.of(modality)
            loss.loss.check(
                process, full_vocabulary=self.full_vocabulary, complementary=self.complementary
            )
            loss.weighting.check(process)

    def __call__(
        self, denoiser: Denoiser, batch: Batch, *, generator: torch.Generator
    ) -> LossTerms:
        """Draw times and noise, then compute the loss of each modality."""
        batch = own_blocks(denoiser, batch)
        corruption = self.corrupt(batch, denoiser.vocabulary, generator=generator)
        return self.terms(denoiser, batch, corruption)

    @torch.no_grad()
    def corrupt(
        self, batch: Batch, vocabulary: Vocabulary, *, generator: torch.Generator
    ) -> Corruption:
        """Draw times and noise, [B, L], or [2 B, L] with complementary masks."""
        batch = self._in_blocks(batch, generator=generator)
        t = self.times(batch, generator=generator)
        first = self.process.corrupt(batch, t, vocabulary, generator=generator)
        first = replace(first, block=batch.block)
        if not self.complementary:
            return first
        second = self.process.complement(batch, first, vocabulary, generator=generator)
        second = replace(second, block=batch.block)
        joint: dict[str, Any] = {
            f.name: torch.cat([getattr(c, f.name) for c in (first, second)])
            for f in fields(Corruption)
            if getattr(first, f.name) is not None
        }
        return Corruption(**joint)

    def _in_blocks(self, batch: Batch, *, generator: torch.Generator) -> Batch:
        """Return the batch in blocks of a length that is drawn, if there are several to draw."""
        if not self.block_lengths:
            return batch
        lengths, number = self.block_lengths, 0
        if len(lengths) > 1:
            device = generator.device
            number = int(torch.randint(len(lengths), (), generator=generator, device=device))
        return in_blocks(batch, lengths[number], prompt=self.prompt_blocks)

    def counts(self, batch: Batch, corruption: Corruption) -> dict[str, Tensor]:
        """Return the denominators, int64 scalars, known before any forward pass."""
        batch = _copies(batch, corruption)
        return {
            name: loss.count(batch.only(modality), corruption.loss_mask & batch.of(modality))
            for name, modality, loss in self._parts()
        }

    def terms(self, denoiser: Denoiser, batch: Batch, corruption: Corruption) -> LossTerms:
        """Run the body once; the head runs only at the covered tokens of each modality."""
        counts, x_t, query_mask = (
            self.counts(batch, corruption),
            corruption.x_t,
            corruption.loss_mask,
        )
        if corruption.block is not None:
            batch = batch.with_blocks(corruption.block[: len(batch)])
        batch = own_blocks(denoiser, batch)
        copies = _copies(batch, corruption)
        several = copies is not batch and batch.block is None
        if several and isinstance(denoiser, SharingDenoiser):
            hidden = denoiser.hidden_of_copies(x_t, batch, query_mask=query_mask)
        else:
            hidden = hidden_beside_clean(denoiser, x_t, copies, query_mask=query_mask)  # [B, L, D]
        batch = copies
        something = bool(corruption.loss_mask.any())
        sums = {}
        for name, modality, loss in self._parts():
            ids = denoiser.vocabulary.range(modality)
            if ids[0] == ids[1]:  # a text-only vocabulary
                sums[name] = hidden.new_zeros(())
                continue
            if self.full_vocabulary:
                ids = (0, denoiser.vocabulary.size)
            positions = corruption.loss_mask & batch.of(modality)
            x_0 = batch.ids[positions] - ids[0]
            if not len(x_0) and something:  # its gradients, all zero, are as large as the head
                sums[name] = hidden.new_zeros(())
                continue
            tokens = Tokens(
                x_0=x_0,
                x_t=corruption.x_t[positions] - ids[0],
                p_mask=corruption.p_mask[positions],
                slope=corruption.slope[positions],
                weight=loss.weighting(batch, corruption)[positions],
                rates=partial(
                    self.process.of(modality).rates,
                    corruption.t[positions],
                    denoiser.vocabulary,
                    ids=ids,
                ),
            )
            divisor = loss.divisor(batch.only(modality))
            share = 1.0 if divisor is None else 1 / divisor[positions]
            head, factor = denoiser.head_weight(), loss.loss.factor(tokens)
            if head is not None and factor is not None:
                sums[name] = linear_cross_entropy(
                    hidden[positions], head, tokens.x_0, factor * share, ids=ids
                )
            else:
                logits = denoiser.logits_at(hidden, positions, ids=ids)
                sums[name] = (loss.loss(logits, tokens) * share).sum()
        return LossTerms(sums=sums, counts=counts)

    def _parts(self) -> tuple[tuple[str, Modality, ModalityLoss], ...]:
        return (("text", Modality.TEXT, self.text), ("image", Modality.IMAGE, self.image))


def _targets_of_document(batch: Batch) -> Tensor:
    """[B, L]: at column d, the number of target tokens of document d of the row."""
    zeros = torch.zeros_like(batch.document)
    return zeros.scatter_add(1, batch.document.clamp_min(0), batch.target.long())


def _copies(batch: Batch, corruption: Corruption) -> Batch:
    """Return the batch, once for each copy that the corruption holds."""
    copies = len(corruption.x_t) // len(batch)
    return batch if copies == 1 else concatenate([batch] * copies)
