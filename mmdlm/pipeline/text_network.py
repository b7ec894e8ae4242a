"""The network of a model as samplers of other libraries call it: ids in, logits of text out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.sequence import NO_DOCUMENT, Batch
from mmdlm.core.vocabulary import Modality


class TextNetwork(nn.Module):
    """Map ids [B, L] to logits [B, L, V] of the token that stands there, which is always text.

    Ids of image codes, markers and the mask have no probability, so that no sampler puts them into
    a text. Under `shift` the logits are moved to the token that they predict.

    Args:
        denoiser: A denoiser of ours, whose weights it shares.
        device: Where it computes.
    """

    def __init__(self, denoiser: Denoiser, device: torch.device) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.device = device

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """Return the logits of all positions; what else callers pass along has no effect.

        Args:
            input_ids: [B, L] int64, text ids and mask tokens.
            attention_mask: [B, L], 0 at padding, which nothing sees; None: there is none.
            position_ids: [B, L]; None: counted over what is no padding.

        Returns:
            An output of transformers with `logits`, [B, L, V].
        """
        vocabulary = self.denoiser.vocabulary
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if position_ids is None:
            position_ids = (real.cumsum(1) - 1).clamp_min(0)
        document = torch.where(real.bool(), 0, NO_DOCUMENT)
        batch = Batch(
            ids=input_ids,
            modality=torch.where(real.bool(), int(Modality.TEXT), int(Modality.CONTROL)),
            target=(input_ids == vocabulary.mask_id) & real.bool(),
            document=document,
            segment=document,
            position=position_ids,
        )
        hidden = self.denoiser.hidden(input_ids, batch)
        start, stop = vocabulary.text
        everywhere = torch.ones_like(real, dtype=torch.bool)
        text = self.denoiser.logits_at(hidden, everywhere, ids=(start, stop))  # [B L, R]
        logits = text.new_full((*input_ids.shape, vocabulary.size), torch.finfo(text.dtype).min)
        logits[..., start:stop] = text.view(*input_ids.shape, stop - start)
        logits[..., vocabulary.mask_id] = torch.finfo(text.dtype).min
        return MaskedLMOutput(logits=logits)
