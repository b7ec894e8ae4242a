"""Losses of single tokens: cross-entropy, score entropy, and their bounds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.diffusion.forward import Absorbing, ForwardProcess, Uniform
from mmdlm.core.diffusion.spindle import Spindle


@dataclass(frozen=True)
class Tokens:
    """The M covered tokens of one modality; ids count from the first column of the logits.

    Attributes:
        x_0: [M] int64; x_t of a masked token lies outside the logits.
        x_t: [M] int64; x_t of a masked token lies outside the logits.
        p_mask: [M], see `Corruption`.
        slope: [M], see `Corruption`.
        weight: [M], that of a `Weighting`.
        rates: Gives [M, R], the weight that each token would have in place of x_0
            (`ForwardProcess.rates`), on demand; None: all the same.
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

    The logits, less log R, are read as log-scores without normalization: the ratio of p(y) to
    p(mask) is s_y = alpha / p_mask * exp(l_y). Then

        sigma' (sum_y s_y - r log s_{x_0} + r (log r - 1)) = weight * (sum_y exp(l_y) - 1 - l_{x_0})

    with r = alpha / p_mask. It exceeds the weighted cross-entropy by Z - 1 - log Z >= 0 for
    Z = sum_y exp(l_y): the same bound where the scores happen to be normalized.
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
