"""Run the forward passes of a sampler: guided, optionally cached, of the rows that need one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mmdlm.core.blocks import first_columns
from mmdlm.core.denoiser import Denoiser
from mmdlm.core.host_masks import on_host, sent
from mmdlm.core.kv_cache import KVCache
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance, GuidedDenoiser
from mmdlm.core.sequence import Batch

_GROWTH = 64  # tokens


@dataclass(frozen=True)
class ForwardPasses:
    """The rows of a batch that are not finished, and the guided denoiser that they share.

    Attributes:
        denoiser: Without guidance.
        guidance: Guides it.
        rows: R numbers of rows in the batch that sampling began with.
        batch: Those rows, with host masks; their first columns, where a cache grows.
        whole: Those rows with all columns.
        others: The unconditional batches of guidance, of the same rows; empty: guidance makes its
            own.
        kv_cache: What cached passes keep; None: nothing is cached.
    """

    denoiser: Denoiser
    guidance: ClassifierFreeGuidance
    rows: tuple[int, ...]
    batch: Batch
    whole: Batch
    others: tuple[Batch, ...]
    kv_cache: KVCache | None

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        batch: Batch,
        *,
        guidance: ClassifierFreeGuidance,
        unconditional: Batch | tuple[Batch, ...] | None,
        use_cache: bool,
    ) -> ForwardPasses:
        """Begin with all rows of a batch."""
        if unconditional is None:
            unconditional = ()
        elif isinstance(unconditional, Batch):
            unconditional = (unconditional,)
        kv_cache = KVCache() if use_cache else None
        others = tuple(one.with_host_masks() for one in unconditional)
        batch = batch.with_host_masks()
        return cls(denoiser, guidance, tuple(range(len(batch))), batch, batch, others, kv_cache)

    @cached_property
    def live(self) -> Tensor:
        """The numbers `rows`, [R] int64 on the device of the batch."""
        return sent(torch.tensor(self.rows, dtype=torch.int64), self.batch.ids.device)

    @cached_property
    def guided(self) -> Denoiser:
        """The denoiser of these rows."""
        return self.guidance(self.denoiser, self.batch, unconditional=self.others or None)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row and of its other branches, without padding: [R] on the host."""
        lengths = [one.host_masks.length for one in (self.batch, *self.others)]
        return torch.stack(lengths).amax(0)

    @property
    def branches(self) -> int:
        """Number of batches whose logits are combined into those of one."""
        return self.guided.branches if isinstance(self.guided, GuidedDenoiser) else 1

    def only(self, unfinished: Tensor) -> ForwardPasses:
        """Drop the rows that are finished by now; `unfinished` is [B] bool, of all rows."""
        going_on = unfinished.numpy().tolist()
        kept = [number for number, row in enumerate(self.rows) if going_on[row]]
        return self if len(kept) == len(self.rows) else self._rows(kept)

    def up_to(self, columns: int, *, begins: bool) -> ForwardPasses:
        """Leave out what lies behind some columns, now and in what is cached.

        A cache grows by several tokens at a time, so that it is not copied for each of them. With
        unconditional batches of their own, whose targets lie in other columns, all stay.

        Args:
            columns: That are needed.
            begins: Whether this is the first pass; later ones never have fewer columns.

        Returns:
            Passes over at least so many columns.
        """
        length = self.whole.ids.shape[1]
        columns = min(length, -(-columns // _GROWTH) * _GROWTH)
        if self.others or (not begins and columns <= self.batch.ids.shape[1]):
            return self
        assert self.kv_cache is not None
        self.kv_cache.grow(columns)
        return replace(self, batch=first_columns(self.whole, columns))

    def hidden(self, x_t: Tensor, query_mask: Tensor) -> Tensor:
        """Return the hidden states [R, L, D] of the rows that are not finished.

        Args:
            x_t: [B, L] noisy ids of all rows.
            query_mask: [B, L] bool on the host. Without a cache: what will be read; with one: what
                is computed again.

        Returns:
            [R, L, D], in the order of the rows, of the columns that `batch` has.
        """
        length = self.batch.ids.shape[1]
        return self.guided.hidden(
            x_t[self.live, :length],
            self.batch,
            query_mask=query_mask[list(self.rows), :length],
            kv_cache=self.kv_cache,
        )

    def first_hidden(self, x_t: Tensor, query_mask: Tensor) -> Tensor:
        """Return the same before anything is drawn: rows that are alike are computed once.

        The rows of a group have the same prompt, and all their targets are still masked.
        """
        alike = self._alike(x_t)
        if alike is None:
            return self.hidden(x_t, query_mask)
        first, of_row = alike
        some = self._rows(first)
        inverse = sent(torch.tensor(of_row), x_t.device)
        hidden = some.hidden(x_t, query_mask)[inverse]
        if self.kv_cache is not None and some.kv_cache is not None:
            known = some.kv_cache.rows(inverse, of=len(first))
            self.kv_cache.keys, self.kv_cache.values = known.keys, known.values
            self.kv_cache.hidden = known.hidden
        return hidden

    def _alike(self, x_t: Tensor) -> tuple[list[int], list[int]] | None:
        """Find U rows no two of which are alike, and which of them each of the R rows is like.

        Returns:
            None if all rows differ, or if images would have to be compared.
        """
        batches = (self.batch, *self.others)
        if len(self.rows) < 2 or any(
            one.features is not None or one.views is not None for one in batches
        ):
            return None
        columns = [x_t[self.live, : self.batch.ids.shape[1]]]
        for one in batches:
            columns += [one.ids, one.modality, one.target.long(), one.document, one.position]
            if one.block is not None:
                columns.append(one.block)
            if one.axes is not None:
                columns.append(one.axes.flatten(1))
            if one.lookahead is not None:
                columns.append(one.lookahead[:, None])
        first: dict[bytes, int] = {}  # number of the row that is seen first, among such rows
        kept: list[int] = []
        of_row: list[int] = []
        for row, content in enumerate(on_host(torch.cat(columns, 1)).numpy()):
            seen = first.setdefault(content.tobytes(), len(kept))
            if seen == len(kept):
                kept.append(row)
            of_row.append(seen)
        return None if len(kept) == len(of_row) else (kept, of_row)

    def _rows(self, kept: list[int]) -> ForwardPasses:
        index = torch.tensor(kept, dtype=torch.int64)
        kv_cache = self.kv_cache
        if kv_cache is not None:
            kv_cache = kv_cache.rows(sent(index, self.batch.ids.device), of=len(self.rows))
        return replace(
            self,
            rows=tuple(self.rows[number] for number in kept),
            batch=self.batch.rows(index),
            whole=self.whole.rows(index),
            others=tuple(one.rows(index) for one in self.others),
            kv_cache=kv_cache,
        )
