"""The forward passes of a sampler: guided, with a memory at will, of the rows that need one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.guidance import ClassifierFreeGuidance
from mmdlm.core.memory import Memory
from mmdlm.core.sequence import Batch


@dataclass(frozen=True)
class Passes:
    """The rows of a batch that are not finished, and the denoiser under guidance that they share.

    live    [R] int64, numbers of the rows in the batch that sampling began with
    batch   those rows
    others  the unconditional batches of guidance, of the same rows; empty: guidance makes its own
    memory  what cached passes remember; None: nothing
    """

    denoiser: Denoiser
    guidance: ClassifierFreeGuidance
    live: Tensor
    batch: Batch
    others: tuple[Batch, ...]
    memory: Memory | None

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        batch: Batch,
        *,
        guidance: ClassifierFreeGuidance,
        unconditional: Batch | tuple[Batch, ...] | None,
        remembering: bool,
    ) -> Passes:
        """All rows of a batch."""
        if unconditional is None:
            unconditional = ()
        elif isinstance(unconditional, Batch):
            unconditional = (unconditional,)
        live = torch.arange(len(batch), device=batch.ids.device)
        memory = Memory() if remembering else None
        return cls(denoiser, guidance, live, batch, unconditional, memory)

    @cached_property
    def guided(self) -> Denoiser:
        """The denoiser of these rows."""
        return self.guidance(self.denoiser, self.batch, unconditional=self.others or None)

    def only(self, unfinished: Tensor) -> Passes:
        """Without the rows that are finished by now; `unfinished` is [B] bool, of all rows."""
        kept = unfinished[self.live].nonzero().squeeze(1)
        return self if len(kept) == len(self.live) else self._rows(kept)

    def hidden(self, x_t: Tensor, at: Tensor) -> Tensor:
        """Noisy ids [B, L] of all rows -> hidden states [R, L, D] of the live ones.

        at  [B, L] bool. Without a memory: what will be read; with one: what is computed anew
        """
        return self.guided.hidden(x_t[self.live], self.batch, at=at[self.live], memory=self.memory)

    def first_hidden(self, x_t: Tensor, at: Tensor) -> Tensor:
        """The same before anything is drawn, when the answers of a group are still one question.

        Rows that are alike go through the network once.
        """
        alike = self._alike(x_t)
        if alike is None:
            return self.hidden(x_t, at)
        first, inverse = alike
        some = self._rows(first)
        hidden = some.hidden(x_t, at)[inverse]
        if self.memory is not None and some.memory is not None:
            known = some.memory.rows(inverse, of=len(first))
            self.memory.keys, self.memory.values = known.keys, known.values
            self.memory.hidden = known.hidden
        return hidden

    def _alike(self, x_t: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rows [U] no two of which are alike, and which of them each row [R] is like.

        None where all differ, and where pictures would have to be compared.
        """
        batches = (self.batch, *self.others)
        if any(one.features is not None or one.views is not None for one in batches):
            return None
        columns = [x_t[self.live]]
        for one in batches:
            columns += [one.ids, one.modality, one.target.long(), one.document, one.position]
            if one.axes is not None:
                columns.append(one.axes.flatten(1))
            if one.ahead is not None:
                columns.append(one.ahead[:, None])
        kinds, inverse = torch.cat(columns, 1).unique(dim=0, return_inverse=True)
        if len(kinds) == len(inverse):
            return None
        places = torch.arange(len(inverse), device=inverse.device)
        first = places.new_full((len(kinds),), len(inverse)).scatter_reduce(
            0, inverse, places, "amin"
        )
        return first, inverse

    def _rows(self, index: Tensor) -> Passes:
        return replace(
            self,
            live=self.live[index],
            batch=self.batch.rows(index),
            others=tuple(one.rows(index) for one in self.others),
            memory=None if self.memory is None else self.memory.rows(index, of=len(self.live)),
        )
