"""The masked-diffusion losses: times, noise, token loss and normalization, each a part to swap."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.denoiser import Denoiser, SharingDenoiser
from mmdlm.core.diffusion.forward import Absorbing, Corruption, ForwardProcess, Spindle, Uniform
from mmdlm.core.losses.fused_cross_entropy import linear_cross_entropy
from mmdlm.core.sequence import Batch, concatenate
from mmdlm.core.vocabulary import GENERATED, Modality, Vocabulary

LossNormalization = Literal["tokens", "masked", "answer", "sequence"]
LEAST_TIME = 2.0**-25  # uniform draws in single precision are multiples of 2^-24


# ---- times --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timesteps(ABC):
    """Draws the time of each document, or of each segment.

    `per` "segment" lets text and image of one document carry independent noise, so that one network
    learns the joint, both conditionals and both marginals. Source: arXiv:2303.06555, section 3.
    """

    per: Literal["document", "segment"] = "document"

    def __call__(self, batch: Batch, *, generator: torch.Generator) -> Tensor:
        """[B, L] times in (0, 1), one a document or segment; 0 where that has no target.

        A draw of exactly 0, at which losses have a limit but no value, stands for what is too small
        for single precision: it becomes half of the least number that can be drawn.
        """
        rows, length = batch.ids.shape
        number = batch.document if self.per == "document" else batch.segment
        first = F.pad(number[:, 1:] != number[:, :-1], (1, 0))  # an empty segment leaves no trace
        row = torch.arange(rows, device=number.device)[:, None]
        unit = row * length + first.cumsum(1)  # [B, L]
        t = torch.zeros(rows * length, device=number.device)
        for target in self._strata(batch):
            present = torch.zeros(rows * length, dtype=torch.bool, device=number.device)
            present = present.index_fill(0, unit[target], True)
            drawn = self.draw(present, generator=generator).clamp_min(LEAST_TIME)
            t = torch.where(present, drawn, t)
        return t[unit]

    def _strata(self, batch: Batch) -> list[Tensor]:
        """Targets [B, L] whose units are drawn together: a segment is of one modality."""
        if self.per == "document":
            return [batch.target]
        return [batch.only(modality).target for modality in GENERATED]

    @abstractmethod
    def draw(self, present: Tensor, *, generator: torch.Generator) -> Tensor:
        """[N] bool, which units exist -> [N] times; those of absent units are ignored."""


@dataclass(frozen=True)
class IndependentTimesteps(Timesteps):
    """t ~ U(0, 1) for each unit."""

    def draw(self, present: Tensor, *, generator: torch.Generator) -> Tensor:
        return torch.rand(present.shape, generator=generator, device=present.device)


@dataclass(frozen=True)
class StratifiedTimesteps(Timesteps):
    """t = (u + i / n) mod 1 with one u ~ U(0, 1): the n units of a batch cover [0, 1] evenly.

    Which unit gets which i is random, so that the times of two segments of a document do not follow
    from each other. Source: arXiv:2107.00630, appendix I.1; the permutation is ours.
    """

    def draw(self, present: Tensor, *, generator: torch.Generator) -> Tensor:
        u = torch.rand((), generator=generator, device=present.device)
        key = torch.rand(present.shape, generator=generator, device=present.device)
        i = key.masked_fill(~present, 2.0).argsort().argsort()  # present units come first
        return (u + i / present.sum()) % 1.0


# ---- weights ------------------------------------------------------------------------------------


class Weighting(ABC):
    """How much each covered token counts: [B, L], which token losses find in `Tokens.weight`."""

    def check(self, process: ForwardProcess) -> None:
        """Raise ValueError where the weights have no meaning for a process; most have for any."""
        return

    @abstractmethod
    def __call__(self, batch: Batch, corruption: Corruption) -> Tensor:
        """[B, L]; only what stands at covered positions is used."""


@dataclass(frozen=True)
class Bound(Weighting):
    """p_mask'(t) / p_mask(t), of which weighted cross-entropy makes the negative ELBO."""

    def __call__(self, batch: Batch, corruption: Corruption) -> Tensor:
        return corruption.weight


@dataclass(frozen=True)
class ContextAdaptive(Weighting):
    """CART: a masked token counts as much as there are clean tokens near it.

        w(n) = 1/2 sum_i [i is clean] p (1 - p)^(|n - i| - 1)

    over the other tokens i of its document, context included. It takes the place of 1 / t.
    Source: arXiv:2508.15487, section on context-adaptive token-level noise rescheduling.
    """

    p: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"ContextAdaptive: p must lie in (0, 1], got {self.p}")

    def check(self, process: ForwardProcess) -> None:
        if not isinstance(process, Absorbing | Spindle):
            raise ValueError(
                f"ContextAdaptive counts clean tokens, which {type(process).__name__} does not "
                "tell from noise; take Absorbing"
            )

    def __call__(self, batch: Batch, corruption: Corruption) -> Tensor:
        clean = (~corruption.is_noised & ~batch.is_padding).to(corruption.weight.dtype)
        left = self._discounted(clean, batch.document)
        right = self._discounted(clean.flip(1), batch.document.flip(1)).flip(1)
        return 0.5 * self.p * (left + right)

    def _discounted(self, clean: Tensor, document: Tensor) -> Tensor:
        """[B, L] sum over tokens to the left, of one document, of (1 - p)^(distance - 1).

        In log2 L rounds, each of which doubles how far the sum reaches.
        """
        length, keep = clean.shape[1], 1 - self.p
        same = document[:, 1:] == document[:, :-1]
        total = F.pad(clean[:, :-1] * same, (1, 0))
        reach = 1
        while reach < length:
            same = document[:, reach:] == document[:, :-reach]
            total = total + keep**reach * F.pad(total[:, :-reach] * same, (reach, 0))
            reach *= 2
        return total


# ---- token losses -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """The M covered tokens of one modality; ids count from the first column of the logits.

    x_0, x_t        [M] int64; x_t of a masked token lies outside the logits
    p_mask, slope   [M], see `Corruption`
    weight          [M], that of a `Weighting`
    rates           gives [M, R], the weight that each token would have in place of x_0
                    (`ForwardProcess.rates`), on demand; None: all the same
    """

    x_0: Tensor
    x_t: Tensor
    p_mask: Tensor
    slope: Tensor
    weight: Tensor
    rates: Callable[[], Tensor | None] = lambda: None


class TokenLoss(ABC):
    """Logits [M, R] and the tokens they should predict -> [M] losses in nats."""

    def check(self, process: ForwardProcess, *, full_vocabulary: bool, complementary: bool) -> None:
        """Raise ValueError where the loss has no meaning for a process; most have for any.

        Args:
            process: That of the modality.
            full_vocabulary: Whether logits are over all ids.
            complementary: Whether a second copy has the complementary mask.
        """
        return

    @abstractmethod
    def __call__(self, logits: Tensor, tokens: Tokens) -> Tensor: ...

    def factor(self, tokens: Tokens) -> Tensor | None:
        """[M], where the loss is so many times the cross-entropy of x_0; None: it is another.

        Then logits need not exist, see `linear_cross_entropy`.
        """
        return None


@dataclass(frozen=True)
class WeightedCrossEntropy(TokenLoss):
    """p_mask'(t) / p_mask(t) * -log p(x_0 | x_t): summed, the negative ELBO of absorbing diffusion.

    Source: arXiv:2406.07524, equation 11.
    """

    def __call__(self, logits: Tensor, tokens: Tokens) -> Tensor:
        return tokens.weight * F.cross_entropy(logits.float(), tokens.x_0, reduction="none")

    def factor(self, tokens: Tokens) -> Tensor:
        return tokens.weight


@dataclass(frozen=True)
class SpindleBound(TokenLoss):
    """The negative ELBO of `Spindle`, where tokens are masked at different rates.

        r(x_0) * -log p(x_0 | x_t) + sum_v p(v | x_t) r(v) - r(x_0)

    with r(v) = p_mask'(t, v) / p_mask(t, v): the divergence of a jump process that unmasks v at
    rate p(v | x_t) r(v) from one that unmasks x_0 at rate r(x_0). Where r is the same for all v the
    last two terms cancel. Complementary masks are refused: they are masks of the process with the
    opposite strength, for which the network would have to predict other probabilities.

    Source: arXiv:2205.14987, section on the continuous-time bound; the rates put in are ours.
    """

    def check(self, process: ForwardProcess, *, full_vocabulary: bool, complementary: bool) -> None:
        if not isinstance(process, Spindle):
            raise ValueError(
                f"SpindleBound is for the Spindle process, not {type(process).__name__}; take "
                "WeightedCrossEntropy"
            )
        if complementary:
            raise ValueError(
                "SpindleBound is no bound of complementary masks, whose rates are others; set "
                "complementary to false"
            )

    def __call__(self, logits: Tensor, tokens: Tokens) -> Tensor:
        rates = tokens.rates()
        assert rates is not None
        log_p = logits.float().log_softmax(-1)
        own = rates.gather(-1, tokens.x_0[:, None]).squeeze(-1)
        expected = (log_p.exp() * rates).sum(-1)
        return -own * log_p.gather(-1, tokens.x_0[:, None]).squeeze(-1) + expected - own


@dataclass(frozen=True)
class CrossEntropy(TokenLoss):
    """-log p(x_0 | x_t), unweighted: MaskGIT's loss, and what MMaDA trains its images with."""

    def __call__(self, logits: Tensor, tokens: Tokens) -> Tensor:
        return F.cross_entropy(logits.float(), tokens.x_0, reduction="none")

    def factor(self, tokens: Tokens) -> Tensor:
        return torch.ones_like(tokens.weight)


@dataclass(frozen=True)
class ScoreEntropy(TokenLoss):
    """SEDD's score entropy under absorbing diffusion.

    The logits, less log R, are read as log-scores without normalisation: the ratio of p(y) to
    p(mask) is s_y = alpha / p_mask * exp(l_y). Then

        sigma' (sum_y s_y - r log s_{x_0} + r (log r - 1)) = weight * (sum_y exp(l_y) - 1 - l_{x_0})

    with r = alpha / p_mask. It exceeds the weighted cross-entropy by Z - 1 - log Z >= 0 for
    Z = sum_y exp(l_y): the same bound where the scores happen to be normalised.
    Source: arXiv:2310.16834, equation 10 and section 4; log R (their log(V - 1)) makes an untrained
    network start near Z = 1.
    """

    def check(self, process: ForwardProcess, *, full_vocabulary: bool, complementary: bool) -> None:
        if not isinstance(process, Absorbing):
            raise ValueError(
                f"ScoreEntropy is for the Absorbing process, not {type(process).__name__}; "
                "for Uniform take UniformScoreEntropy"
            )

    def __call__(self, logits: Tensor, tokens: Tokens) -> Tensor:
        logits = logits.float() - math.log(logits.shape[-1])
        log_z = logits.logsumexp(-1)
        score = logits.gather(-1, tokens.x_0[:, None]).squeeze(-1)
        return tokens.weight * (torch.expm1(log_z) - score)


@dataclass(frozen=True)
class UniformScoreEntropy(TokenLoss):
    """SEDD's score entropy under uniform diffusion: the negative ELBO of `Uniform(cover_all=True)`.

    The softmax pi of the logits is read as p(x_0 | all other tokens), what `Uniform` teaches at
    noised positions, so that one network serves both losses and the sampler. It implies the scores
    s_y = (1 + c pi_y) / (1 + c pi_{x_t}) with c = R alpha / p_mask, and the loss is

        sigma' / R * sum_{y != x_t} (s_y - r_y log s_y + r_y (log r_y - 1))

    where r_y, the true ratio given x_0, is s_y with pi = onehot(x_0).
    At p_mask = 0 it has its limit, sigma' / R (1 / pi_{x_0} - 1), to within single precision. It is
    the bound as it stands, and takes no weights of a `Weighting`.

    Source: arXiv:2310.16834, equation 10 with the uniform matrix of section 4.1; the reading of the
    logits is ours, so that the network needs no time.
    """

    def check(self, process: ForwardProcess, *, full_vocabulary: bool, complementary: bool) -> None:
        if not (isinstance(process, Uniform) and process.cover_all):
            raise ValueError(
                "UniformScoreEntropy covers clean positions too: it needs the process "
                f"Uniform(cover_all=True), got {process}"
            )
        if process.exact_count:
            raise ValueError(
                "UniformScoreEntropy is the bound of tokens that are noised independently; set "
                "exact_count of the process to false"
            )
        if complementary:
            raise ValueError(
                "UniformScoreEntropy covers every target in one copy already; set complementary to "
                "false"
            )
        if full_vocabulary:
            raise ValueError(
                "UniformScoreEntropy needs logits over the range in which tokens are noised; "
                "set full_vocabulary to false"
            )

    def __call__(self, logits: Tensor, tokens: Tokens) -> Tensor:
        size = logits.shape[-1]
        p_mask = tokens.p_mask.clamp(2.0**-24, 1 - 2.0**-24)
        c = size * (1 - p_mask) / p_mask  # [M]
        log_rho = torch.log1p(c)  # the ratio at x_0 of a token that was noised
        log_s = torch.log1p(c[:, None] * logits.float().softmax(-1))  # [M, R]
        log_s = log_s - log_s.gather(-1, tokens.x_t[:, None])

        # as if r were the same for all y: 1 where x_t is noise, 1 / rho where it is x_0
        clean = tokens.x_t == tokens.x_0
        log_r = torch.where(clean, -log_rho, 0.0)
        log_z = log_s - log_r[:, None]
        gap = torch.expm1(log_z) - log_z  # >= 0, and 0 where s = r
        loss = log_r.exp() * (gap.sum(-1) - gap.gather(-1, tokens.x_t[:, None]).squeeze(-1))
        # y = x_0 of a noised token has r = rho
        log_s_0 = log_s.gather(-1, tokens.x_0[:, None]).squeeze(-1)
        extra = (1 + c) * log_rho - c * (1 + log_s_0)
        sigma_slope = tokens.slope / (1 - p_mask)
        return sigma_slope / size * (loss + torch.where(clean, 0.0, extra))


# ---- the objective ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModalityLoss:
    """What is summed over the covered tokens of one modality, and what the sum is divided by.

    weighting   what a token counts, for the losses that have weights
    loss_normalization  "tokens"    all target tokens: nats per token, LLaDA's pretraining
                "masked"    the covered tokens: a plain mean, MMaDA's images
                "answer"    each document's own target tokens, then the number of documents: a short
                            answer counts as much as a long one, LLaDA's fine-tuning
                "sequence"  the number of documents: nats per document
    """

    loss: TokenLoss = WeightedCrossEntropy()
    loss_normalization: LossNormalization = "tokens"
    weighting: Weighting = Bound()

    def __post_init__(self) -> None:
        known = ("tokens", "masked", "answer", "sequence")
        if self.loss_normalization not in known:
            raise ValueError(
                f"loss_normalization {self.loss_normalization!r} is not one of {', '.join(known)}"
            )

    def count(self, batch: Batch, is_noised: Tensor) -> Tensor:
        """The denominator, a scalar int64, over the targets that `batch` has."""
        if self.loss_normalization == "tokens":
            return batch.target.sum()
        if self.loss_normalization == "masked":
            return is_noised.sum()
        return (_targets_of_document(batch) > 0).sum()

    def divisor(self, batch: Batch) -> Tensor | None:
        """[B, L] what each token's loss is divided by before it is summed; None for 1."""
        if self.loss_normalization != "answer":
            return None
        return _targets_of_document(batch).gather(1, batch.document.clamp_min(0))


@dataclass(frozen=True)
class LossTerms:
    """Sums and counts by modality ("text", "image"), never means: the training loop divides once,
    after it has added the counts of all processes and accumulation steps. Sums carry gradient."""

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """What a training step minimises.

    process          the forward process, one for all or `PerModality`
    text, image      token loss and normalization of each modality
    times            how times are drawn
    complementary    every document twice, the second copy with the complementary mask, so that each
                     target is covered once; twice the rows
    full_vocabulary  logits over all ids, not over the range of the position's modality
    """

    process: ForwardProcess
    text: ModalityLoss = ModalityLoss()
    image: ModalityLoss = ModalityLoss()
    times: Timesteps = StratifiedTimesteps()
    complementary: bool = False
    full_vocabulary: bool = False

    def __post_init__(self) -> None:
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
        corruption = self.corrupt(batch, denoiser.vocabulary, generator=generator)
        return self.terms(denoiser, batch, corruption)

    @torch.no_grad()
    def corrupt(
        self, batch: Batch, vocabulary: Vocabulary, *, generator: torch.Generator
    ) -> Corruption:
        """Draw times and noise, [B, L], or [2 B, L] with complementary masks."""
        t = self.times(batch, generator=generator)
        first = self.process.corrupt(batch, t, vocabulary, generator=generator)
        if not self.complementary:
            return first
        second = self.process.complement(batch, first, vocabulary, generator=generator)
        return Corruption(
            *(torch.cat([getattr(c, f.name) for c in (first, second)]) for f in fields(Corruption))
        )

    def counts(self, batch: Batch, corruption: Corruption) -> dict[str, Tensor]:
        """The denominators, int64 scalars, known before any forward pass."""
        batch = _copies(batch, corruption)
        return {
            name: loss.count(batch.only(modality), corruption.is_noised & batch.of(modality))
            for name, modality, loss in self._parts()
        }

    def terms(self, denoiser: Denoiser, batch: Batch, corruption: Corruption) -> LossTerms:
        """One pass of the body; the head runs at the covered tokens of each modality alone."""
        counts, x_t, query_mask = (
            self.counts(batch, corruption),
            corruption.x_t,
            corruption.is_noised,
        )
        copies = _copies(batch, corruption)
        if copies is not batch and isinstance(denoiser, SharingDenoiser):
            hidden = denoiser.hidden_of_copies(x_t, batch, query_mask=query_mask)
        else:
            hidden = denoiser.hidden(x_t, copies, query_mask=query_mask)  # [B, L, D]
        batch = copies
        something = bool(corruption.is_noised.any())
        sums = {}
        for name, modality, loss in self._parts():
            ids = denoiser.vocabulary.range(modality)
            if ids[0] == ids[1]:  # a text-only vocabulary
                sums[name] = hidden.new_zeros(())
                continue
            if self.full_vocabulary:
                ids = (0, denoiser.vocabulary.size)
            here = corruption.is_noised & batch.of(modality)
            x_0 = batch.ids[here] - ids[0]
            if not len(x_0) and something:  # its gradients, all zero, are as large as the head
                sums[name] = hidden.new_zeros(())
                continue
            tokens = Tokens(
                x_0=x_0,
                x_t=corruption.x_t[here] - ids[0],
                p_mask=corruption.p_mask[here],
                slope=corruption.slope[here],
                weight=loss.weighting(batch, corruption)[here],
                rates=partial(
                    self.process.of(modality).rates,
                    corruption.t[here],
                    denoiser.vocabulary,
                    ids=ids,
                ),
            )
            divisor = loss.divisor(batch.only(modality))
            share = 1.0 if divisor is None else 1 / divisor[here]
            head, factor = denoiser.head_weight(), loss.loss.factor(tokens)
            if head is not None and factor is not None:
                sums[name] = linear_cross_entropy(
                    hidden[here], head, tokens.x_0, factor * share, ids=ids
                )
            else:
                logits = denoiser.logits_at(hidden, here, ids=ids)
                sums[name] = (loss.loss(logits, tokens) * share).sum()
        return LossTerms(sums=sums, counts=counts)

    def _parts(self) -> tuple[tuple[str, Modality, ModalityLoss], ...]:
        return (("text", Modality.TEXT, self.text), ("image", Modality.IMAGE, self.image))


def _targets_of_document(batch: Batch) -> Tensor:
    """[B, L]: at column d, the number of target tokens of document d of the row."""
    zeros = torch.zeros_like(batch.document)
    return zeros.scatter_add(1, batch.document.clamp_min(0), batch.target.long())


def _copies(batch: Batch, corruption: Corruption) -> Batch:
    """The batch, once for each copy that the corruption holds."""
    copies = len(corruption.x_t) // len(batch)
    return batch if copies == 1 else concatenate([batch] * copies)
