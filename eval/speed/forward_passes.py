"""How many forward passes an answer took, and over how many tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mmdlm.core.kv_cache import KVCache
from mmdlm.core.sequence import Batch
from mmdlm.pipeline.model import Model


class CountedDenoiser(nn.Module):
    """A denoiser that counts, and is in all else the one it was given.

    `rows` counts the rows of all passes, even of those over a few of their places; each branch of
    guidance is a row. `tokens` counts the tokens of these rows that were computed, with padding.
    """

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self._denoiser = denoiser
        self.rows = self.tokens = 0

    def hidden(
        self,
        x_t: Tensor,
        batch: Batch,
        *,
        query_mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """Of the denoiser."""
        some = query_mask is not None and kv_cache is not None and kv_cache.hidden is not None
        self.rows += len(x_t)
        self.tokens += int(query_mask.sum()) if query_mask is not None and some else x_t.numel()
        states: Tensor = self._denoiser.hidden(x_t, batch, query_mask=query_mask, kv_cache=kv_cache)
        return states

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_denoiser":
                raise
            return getattr(self._denoiser, name)


def counted(model: Model) -> tuple[Model, CountedDenoiser]:
    """Return the model, and a counter of the passes of its denoiser from now on."""
    counting = CountedDenoiser(model.denoiser)
    return replace(model, denoiser=counting), counting
