"""The contract of a model: all of `core` is written against it, never against a network."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Vocabulary


class Denoiser(Protocol):
    """Predicts x_0 from x_t, in two steps, so that the output head runs only where it is needed.

    There is no time argument: under absorbing diffusion the posterior of a masked token depends on
    the visible tokens alone. Source: arXiv:2406.03736, theorem 1.
    """

    @property
    def vocabulary(self) -> Vocabulary:
        """The id space of inputs and outputs."""
        ...

    def hidden(self, x_t: Tensor, batch: Batch) -> Tensor:
        """Noisy ids [B, L] -> hidden states [B, L, D].

        `batch` says which tokens see each other (`document`, `ahead`), where they stand
        (`position`) and what fills the feature slots (`features`); its `ids` are clean and must not
        be read.
        """
        ...

    def logits_at(
        self, hidden: Tensor, positions: Tensor, *, ids: tuple[int, int] | None = None
    ) -> Tensor:
        """Logits of x_0 at M = positions.sum() places, in row-major order.

        hidden     [B, L, D]
        positions  [B, L] bool
        ids        half-open id range; the result is [M, stop - start], its column 0 is id `start`.
                   None: the whole vocabulary, [M, V]
        """
        ...
