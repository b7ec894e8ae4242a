"""The contract of a model: all of `core` is written against it, never against a network."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from mmdlm.core.kv_cache import KVCache
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary


class Denoiser(Protocol):
    """Predicts x_0 from x_t, in two steps, so that the output head runs only where it is needed.

    There is no time argument: under absorbing diffusion the posterior of a masked token depends
    only on the visible tokens. Source: arXiv:2406.03736, theorem 1.
    """

    @property
    def vocabulary(self) -> Vocabulary:
        """The id space of inputs and outputs."""
        ...

    def hidden(
        self,
        x_t: Tensor,
        batch: Batch,
        *,
        query_mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """Compute the hidden states [B, L, D] of noisy ids [B, L].

        `batch` says which tokens see each other (`document`, `lookahead`, `block`), where they
        stand (`position`) and what fills the feature slots (`features`); its `ids` are clean and
        must not be read.

        Args:
            x_t: Noisy ids, [B, L] int64.
            batch: The layout of the ids.
            query_mask: [B, L] bool, the only positions whose states will be read; others may hold
                anything. None: all.
            kv_cache: The keys, values and states of the same rows from earlier passes. With it the
                positions of `query_mask` are computed again and cached, and all others keep their
                state; in the first pass all are computed. Only states of targets will be read.

        Returns:
            Hidden states, [B, L, D].

        Raises:
            ValueError: If a cache is given to a denoiser that has none.
        """
        ...

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        """Return the logits of x_0 at M = positions.sum() places, in row-major order.

        Args:
            hidden: [B, L, D] hidden states.
            positions: [B, L] bool, where logits are wanted.
            ids: Half-open id range; the result is [M, stop - start], its column 0 is id `start`.
                None: the whole vocabulary, [M, V].

        Returns:
            [M, V], or [M, stop - start].
        """
        ...

    def head_weight(self) -> Tensor | None:
        """[V, D] such that `logits_at` is states @ head.T, for losses that fuse the two.

        None: there is no such matrix.
        """
        ...


@runtime_checkable
class SharingDenoiser(Denoiser, Protocol):
    """One that can compute once what noisy copies of a batch have in common."""

    def hidden_of_copies(self, x_t: Tensor, batch: Batch, *, query_mask: Tensor) -> Tensor:
        """Compute the hidden states of K copies of the ids of a batch of B rows, copy after copy.

        Args:
            x_t: [K B, L] int64, noisy ids.
            batch: Layout of the B rows.
            query_mask: [K B, L] bool, the only places whose states will be read.

        Returns:
            [K B, L, D].
        """
        ...


@runtime_checkable
class BlockDenoiser(Denoiser, Protocol):
    """One that may be of block diffusion: a token sees its own block and those before it."""

    @property
    def block_length(self) -> int | None:
        """Tokens of a block; None: every token sees all of its document."""
        ...

    def in_blocks(self, batch: Batch) -> Batch:
        """Return the batch cut into the blocks of the model, unless it is cut already.

        Without blocks the batch stays as it is.
        """
        ...
