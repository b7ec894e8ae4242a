"""Numbers to log that add up over micro-batches and processes, under the names that TRL uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Scalars by name, without gradient; what is divided is divided at the end, in `values`.

    Attributes:
        sums: Of means, the same names in both.
        counts: Of means, the same names in both.
        least: Of which the smallest and the largest is kept.
        most: Of which the smallest and the largest is kept.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    least: dict[str, Tensor] = field(default_factory=dict)
    most: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def means(cls, **values: tuple[Tensor, Tensor | None]) -> Statistics:
        """Of values and the bool mask of those that count (None: all), both of one shape."""
        sums, counts = {}, {}
        for name, (value, mask) in values.items():
            mask = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
            sums[name] = torch.where(mask, value.detach(), 0.0).sum()
            counts[name] = mask.sum()
        return cls(sums=sums, counts=counts)

    def named(self, names: dict[str, str]) -> Statistics:
        """Rename the statistics, for names that are no Python identifiers."""

        def renamed(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {names.get(name, name): value for name, value in values.items()}

        return Statistics(*(renamed(part) for part in self.parts))

    def __add__(self, other: Statistics) -> Statistics:
        """Both together."""
        operations: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
            torch.add,
            torch.add,
            torch.minimum,
            torch.maximum,
        )
        joined = [
            {
                name: operation(mine[name], theirs[name])
                if name in mine and name in theirs
                else (mine if name in mine else theirs)[name]
                for name in {**mine, **theirs}
            }
            for mine, theirs, operation in zip(self.parts, other.parts, operations, strict=True)
        ]
        return Statistics(*joined)

    def values(self) -> dict[str, float]:
        """Return what to log. A mean of nothing is left out."""
        means = {
            name: float(self.sums[name] / count)
            for name, count in self.counts.items()
            if int(count) > 0
        }
        extremes = {**self.least, **self.most}
        return means | {name: float(value) for name, value in extremes.items()}

    @property
    def parts(self) -> tuple[dict[str, Tensor], ...]:
        """Return the sums, counts, least and most, each by name."""
        return self.sums, self.counts, self.least, self.most
