"""Compute equal rows of a batch once: the answers of a question share their noisy copies."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mmdlm.core.blocks import own_blocks
from mmdlm.core.denoiser import BlockDenoiser, Denoiser
from mmdlm.core.kv_cache import KVCache
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary

CLEAN = ("ids", "segment", "features", "views")  # what a denoiser does not read, or no row has


@dataclass(frozen=True)
class DistinctRows:
    """A denoiser that computes rows with equal noisy ids and equal layout once.

    Answers of a question that have as many tokens are one row where all of their tokens are masked,
    and so are answers that begin alike. Each row gets what it gets alone.

    Attributes:
        denoiser: Computes the others.
    """

    denoiser: Denoiser

    @property
    def vocabulary(self) -> Vocabulary:
        """That of the denoiser."""
        return self.denoiser.vocabulary

    @property
    def block_length(self) -> int | None:
        """That of the denoiser, if it may have blocks."""
        return self.denoiser.block_length if isinstance(self.denoiser, BlockDenoiser) else None

    def in_blocks(self, batch: Batch) -> Batch:
        """Return the batch in the blocks of the denoiser."""
        return own_blocks(self.denoiser, batch)

    def hidden(
        self,
        x_t: Tensor,
        batch: Batch,
        *,
        query_mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """Compute hidden states [B, L, D]; see `Denoiser.hidden`."""
        if kv_cache is None and query_mask is not None and batch.features is None:
            first, place = distinct_rows(x_t, batch, query_mask)
            if len(first) < len(x_t):
                rows = first.to(x_t.device)
                hidden = self.denoiser.hidden(
                    x_t[rows], batch.rows(first), query_mask=query_mask[rows]
                )
                return hidden[place.to(hidden.device)]
        return self.denoiser.hidden(x_t, batch, query_mask=query_mask, kv_cache=kv_cache)

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        """Return logits [M, R]; see `Denoiser.logits_at`."""
        return self.denoiser.logits_at(hidden, positions, ids=ids)

    def head_weight(self) -> Tensor | None:
        """Return that of the denoiser."""
        return self.denoiser.head_weight()


def distinct_rows(x_t: Tensor, batch: Batch, query_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Find the rows that differ.

    Args:
        x_t: [B, L] int64, noisy ids.
        batch: Their layout.
        query_mask: [B, L] bool, the places that are read.

    Returns:
        The first row of each kind, [U] int64, and the kind of each row, [B] int64; on the CPU.
    """
    layout = [
        value.reshape(len(batch), -1)
        for one in fields(batch)
        if one.name not in CLEAN and isinstance(value := getattr(batch, one.name), Tensor)
    ]
    rows = torch.cat([x_t, query_mask.long(), *(one.long() for one in layout)], 1).cpu().numpy()
    kinds: dict[bytes, int] = {}
    first: list[int] = []
    place = []
    for number, row in enumerate(rows):
        kind = kinds.setdefault(row.tobytes(), len(first))
        if kind == len(first):
            first.append(number)
        place.append(kind)
    return torch.tensor(first), torch.tensor(place)
