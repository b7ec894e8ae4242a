"""Score entropy (SEDD), under absorbing and under uniform diffusion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.diffusion.forward import Absorbing, ForwardProcess
from mmdlm.core.losses.token_losses import TokenLoss, Tokens
from mmdlm.experimental.uniform import Uniform


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
