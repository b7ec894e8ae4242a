"""Learning from pairs of answers, one preferred to the other, without rewards or rollouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.losses.objective import LossTerms
from mmdlm.rl.statistics import Statistics


@dataclass(frozen=True)
class PreferenceTerms(LossTerms):
    """Sums and counts of "preference" and "sft", to be divided once.

    Statistics carry TRL's names.
    """

    statistics: Statistics


@dataclass(frozen=True)
class Answers:
    """What is said of N answers, the chosen or the rejected ones; all [N].

    Attributes:
        policy: Log-likelihood, or its bound, under the policy, in nats.
        reference: The same under the reference, of the same views.
        tokens: Number of tokens.
    """

    policy: Tensor
    reference: Tensor
    tokens: Tensor


class PreferenceLoss(ABC):
    """A loss of N pairs; text or images, whatever an estimator scores."""

    @property
    @abstractmethod
    def coefficients(self) -> dict[str, float]:
        """What each term counts in the loss."""

    @abstractmethod
    def __call__(self, chosen: Answers, rejected: Answers) -> PreferenceTerms:
        """Return the terms; all are divided by the number of pairs."""


@dataclass(frozen=True)
class Vrpo(PreferenceLoss):
    """Direct preference optimisation on evidence lower bounds, with a fine-tuning term.

        -log sigmoid(beta (B(y_w) - B_ref(y_w)) - beta (B(y_l) - B_ref(y_l))) - sft B(y_w) / |y_w|

    for bounds B of the chosen answer y_w and the rejected y_l. What makes the variance bearable is
    in the bounds: many timesteps with one mask each (`Elbo(repeats=8, strata=1)`), and the same
    views for the policy and the reference ("antithetic sampling" in the paper: common random
    numbers; the two answers of a pair have each their own).

    Source: arXiv:2505.19223 (LLaDA 1.5, VRPO), sections 2 and 3 and its training details: beta 0.2,
    weight of the masked fine-tuning loss 0.05; DPO: arXiv:2305.18290, equation 7. No code was
    released. The fine-tuning term is the chosen answer's own bound, so that it costs no further
    pass; the end-of-text padding is left out by not making it a target.
    """

    beta: float = 0.2
    sft: float = 0.05

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"Vrpo: beta must be above 0, got {self.beta}")
        if self.sft < 0:
            raise ValueError(f"Vrpo: sft must not be negative, got {self.sft}")

    @property
    def coefficients(self) -> dict[str, float]:
        return {"preference": 1.0} | ({"sft": self.sft} if self.sft else {})

    def __call__(self, chosen: Answers, rejected: Answers) -> PreferenceTerms:
        won = self.beta * (chosen.policy - chosen.reference.detach())
        lost = self.beta * (rejected.policy - rejected.reference.detach())
        sums = {"preference": -F.logsigmoid(won - lost).sum()}
        if self.sft:
            sums["sft"] = -(chosen.policy / chosen.tokens.clamp_min(1)).sum()
        count = torch.tensor(len(won), device=won.device)
        logged = Statistics.means(
            chosen=(won, None),
            rejected=(lost, None),
            margins=(won - lost, None),
            accuracies=((won > lost).to(won.dtype), None),
        ).named({n: f"rewards/{n}" for n in ("chosen", "rejected", "margins", "accuracies")})
        logged = logged + Statistics.means(
            chosen=(chosen.policy, None), rejected=(rejected.policy, None)
        ).named({n: f"logps/{n}" for n in ("chosen", "rejected")})
        return PreferenceTerms(sums=sums, counts=dict.fromkeys(sums, count), statistics=logged)
