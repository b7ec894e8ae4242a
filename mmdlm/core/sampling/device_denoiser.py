"""Let a sampler on the CPU ask a denoiser on a device that lacks float64 (Apple's GPUs)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.kv_cache import KVCache
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class DeviceDenoiser:
    """A denoiser on another device than the batches that it is given.

    Draws and orders are computed in float64, which some devices do not have. So the state of the
    rows stays on the CPU; ids go to the device, and logits of open positions come back.

    Attributes:
        denoiser: On `device`.
        device: Where it computes.
    """

    denoiser: Denoiser
    device: torch.device

    @property
    def vocabulary(self) -> Vocabulary:
        """That of the denoiser."""
        return self.denoiser.vocabulary

    def hidden(
        self,
        x_t: Tensor,
        batch: Batch,
        *,
        query_mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """Compute hidden states [B, L, D] on the device; see `Denoiser.hidden`."""
        return self.denoiser.hidden(
            x_t.to(self.device),
            batch.to(self.device),
            query_mask=query_mask,
            kv_cache=kv_cache,
        )

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        """Return logits [M, R] on the CPU; see `Denoiser.logits_at`."""
        return self.denoiser.logits_at(hidden, positions, ids=ids).cpu()

    def head_weight(self) -> Tensor | None:
        """Return None: logits are what comes back."""
        return None
