"""Classifier-free guidance: two branches, one forward pass, one set of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.sequence import Batch, concatenate
from mmdlm.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """logits = uncond + scale * (cond - uncond).

    1 is off and costs no second branch; 0 is the unconditional model; above 1 the condition is
    exaggerated. LLaDA's and MMaDA's published scales are this one less 1.
    Source: arXiv:2207.12598, equation 6 with scale = w + 1.
    """

    scale: float = 1.0

    def __call__(
        self, denoiser: Denoiser, batch: Batch, *, unconditional: Batch | None = None
    ) -> Denoiser:
        """The denoiser of `batch` under guidance.

        unconditional  the other branch, with the same targets in the same places (for a negative
                       prompt); default: `batch` without its context
        """
        if self.scale == 1.0:
            return denoiser
        if unconditional is None:
            unconditional = batch.without_context(denoiser.vocabulary)
        if not torch.equal(unconditional.target, batch.target):
            raise ValueError(
                "guidance: the unconditional batch must have its targets where the batch has them; "
                f"it has {int(unconditional.target.sum())} in {tuple(unconditional.ids.shape)}, "
                f"the batch {int(batch.target.sum())} in {tuple(batch.ids.shape)}"
            )
        return GuidedDenoiser(denoiser, batch, unconditional=unconditional, scale=self.scale)


class GuidedDenoiser:
    """A denoiser of one batch; its hidden states are those of both branches, [B, L, 2 D]."""

    def __init__(
        self, denoiser: Denoiser, batch: Batch, *, unconditional: Batch, scale: float
    ) -> None:
        self._denoiser = denoiser
        self._batch = batch
        self._context = unconditional.ids
        self._branches = concatenate([batch, unconditional])
        self._scale = scale

    @property
    def vocabulary(self) -> Vocabulary:
        return self._denoiser.vocabulary

    def hidden(self, x_t: Tensor, batch: Batch) -> Tensor:
        """[B, L] -> [B, L, 2 D]; the targets of both branches hold the same noisy ids."""
        assert batch is self._batch, "a guided denoiser belongs to the batch it was made for"
        both = torch.cat([x_t, torch.where(batch.target, x_t, self._context)])  # [2 B, L]
        return torch.cat(self._denoiser.hidden(both, self._branches).chunk(2, dim=0), dim=-1)

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        cond, uncond = (
            self._denoiser.logits_at(branch, positions, ids=ids)
            for branch in hidden.chunk(2, dim=-1)
        )
        return uncond + self._scale * (cond - uncond)
