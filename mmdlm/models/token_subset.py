"""A subset of the tokens of some rows, gathered so that a layer computes only those."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdlm.core.host_masks import numbers_of, on_host, sent


@dataclass(frozen=True)
class TokenSubset:
    """The marked places of R of B rows, at most A of them in a row.

    Attributes:
        rows: [R] int64; None: all B.
        column: [R, A] int64, from left to right; rows with fewer go on with any others. None: A is
            L, all places of these rows are marked.
        filled: [M] int64, row * A + column of what does not stand for those others; None: every row
            has A.
        flat: [M] int64, row * L + column of all that are marked.
    """

    rows: Tensor | None
    column: Tensor | None
    filled: Tensor | None
    flat: Tensor

    @classmethod
    def of(
        cls,
        with_host_masks: Tensor,
        rows: Tensor | None = None,
        *,
        device: torch.device | None = None,
    ) -> TokenSubset:
        """Return the tokens marked in [B, L] bool, of the rows marked in [B] bool.

        Args:
            with_host_masks: [B, L] bool, tokens to compute.
            rows: [B] bool, rows to compute; None: all.
            device: Where they are put; default: where the marks lie. They are worked out on the
                host.

        Returns:
            Their places, as the layers need them.
        """
        device = with_host_masks.device if device is None else device
        marks = on_host(with_host_masks).numpy()
        chosen = None if rows is None else on_host(rows).numpy()
        if chosen is not None:
            marks = marks & chosen[:, None]
        index, flat = None, numbers_of(torch.from_numpy(marks))
        if chosen is not None and not chosen.all():
            index = torch.from_numpy(chosen.nonzero()[0])
            marks = marks[chosen]
        column = filled = None
        if len(flat) < marks.size:
            count = marks.sum(1)
            most = int(count.max())
            column = torch.from_numpy((~marks).argsort(1, kind="stable")[:, :most])
            if len(flat) < column.numel():
                filled = numbers_of(torch.arange(most) < torch.from_numpy(count)[:, None])
        index, column, filled = (
            None if x is None else sent(x, device) for x in (index, column, filled)
        )
        return cls(index, column, filled, sent(flat, device))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TokenSubset:
        """On another device: where layers are spread over several, each moves what it is given."""
        if self.flat.device == torch.device(device):
            return self
        parts = (self.rows, self.column, self.filled, self.flat)
        rows, column, filled, flat = (
            None if x is None else x.to(device, non_blocking=non_blocking) for x in parts
        )
        assert flat is not None
        return TokenSubset(rows, column, filled, flat)

    def rows_of(self, x: Tensor) -> Tensor:
        """[B, ...] -> [R, ...]."""
        return x if self.rows is None else x[self.rows]

    def take(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [R, A, ...]."""
        x = self.rows_of(x)
        if self.column is None:
            return x
        index = self.column.reshape(*self.column.shape, *[1] * (x.ndim - 2))
        return x.gather(1, index.expand(-1, -1, *x.shape[2:]))

    def put(self, into: Tensor, x: Tensor) -> Tensor:
        """[B, L, ...] in which the marked places are those of x [R, A, ...]."""
        return into.flatten(0, 1).index_copy(0, self.flat, self._values(x)).view_as(into)

    def put_(self, into: Tensor, x: Tensor) -> None:
        """Write the tokens of the subset into a row, in place."""
        into.flatten(0, 1).index_copy_(0, self.flat, self._values(x))

    def _values(self, x: Tensor) -> Tensor:
        """[R, A, ...] -> [M, ...], without what stands for nothing."""
        x = x.flatten(0, 1)
        return x if self.filled is None else x[self.filled]
