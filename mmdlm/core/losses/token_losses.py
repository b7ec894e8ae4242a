"""Losses of single tokens: cross-entropy and its bounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.diffusion.forward import ForwardProcess
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
