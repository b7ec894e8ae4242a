"""What a denoiser keeps of a row from one denoising step to the next."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class KVCache:
    """Keys, values and hidden states of N rows, as they were when each place was last computed.

    A denoiser that is given a cache writes to it; nothing else in core is changed in place.

    Attributes:
        keys: One [N, L, H, d] for each layer; empty before the first pass.
        values: One [N, L, H, d] for each layer; empty before the first pass.
        hidden: [N, L, D], the states after the last layer; None before the first pass.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    hidden: Tensor | None = None

    def grow(self, length: int) -> None:
        """Make room for rows of `length` tokens; what is new is zero until it is computed."""
        if self.hidden is None or self.hidden.shape[1] >= length:
            return
        more = length - self.hidden.shape[1]
        self.keys = [F.pad(one, (0, 0, 0, 0, 0, more)) for one in self.keys]
        self.values = [F.pad(one, (0, 0, 0, 0, 0, more)) for one in self.values]
        self.hidden = F.pad(self.hidden, (0, 0, 0, more))

    def rows(self, index: Tensor, *, of: int) -> KVCache:
        """Return the cache of some of `of` rows; one of several branches holds them in turn."""
        if self.hidden is None:
            return KVCache()
        branches = len(self.hidden) // of
        index = torch.cat([index + of * branch for branch in range(branches)])
        return replace(
            self,
            keys=[one[index] for one in self.keys],
            values=[one[index] for one in self.values],
            hidden=self.hidden[index],
        )
