"""Random numbers of a batch: from one generator for all rows, or from one of each row's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]
Rows = tuple[slice, slice]  # of a tensor [B, L]: which rows, and how far into them
Run = tuple[int, torch.Generator]  # of things one after the other: how many one generator draws for


def check_generators(given: object, rows: int) -> None:
    """Raise ValueError unless it is a generator, or a list of one for each of some rows."""
    if isinstance(given, torch.Generator):
        return
    if not isinstance(given, list | tuple):
        raise ValueError(
            "generator must be a torch.Generator, or a list of one for each output, not "
            f"{given!r}; make one of a seed by torch.Generator().manual_seed(...)"
        )
    for number, one in enumerate(given):
        if not isinstance(one, torch.Generator):
            raise ValueError(
                f"generator {number} of the list must be a torch.Generator, not {one!r}; make one "
                "of a seed by torch.Generator().manual_seed(...)"
            )
    if len(given) != rows:
        raise ValueError(
            f"generator: a list of {len(given)} for {rows} outputs; give one generator for each "
            "output, or a single one for all"
        )
    if len({id(one) for one in given}) < len(given):
        raise ValueError(
            "generator: the list holds the same torch.Generator more than once, so that its "
            "outputs would depend on each other; make one for each output"
        )


@dataclass(frozen=True)
class RowGenerators:
    """The generators of B rows.

    generators  one for all rows, or one for each
    lengths     tokens of each row where it has its own generator, which draws for these alone, as
                if there were no other row and so no padding; empty: there is one for all rows
    """

    generators: tuple[torch.Generator, ...]
    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, given: Generators, lengths: Tensor) -> RowGenerators:
        """Of rows of some lengths, [B] on the host. Raises ValueError, see `check_generators`."""
        check_generators(given, len(lengths))
        if isinstance(given, torch.Generator):
            return cls((given,))
        return cls(tuple(given), tuple(lengths.numpy().tolist()))

    @property
    def is_own(self) -> bool:
        """Whether each row has a generator of its own."""
        return len(self.generators) == len(self.lengths)

    def for_rows(self, function: Callable[[slice, torch.Generator], Tensor]) -> Tensor:
        """[B, ...] of a function that takes rows: of all at once, or of one after the other."""
        if not self.is_own:
            return function(slice(None), self.generators[0])
        return torch.cat([function(slice(b, b + 1), one) for b, one in enumerate(self.generators)])

    def for_tokens(
        self, into: Tensor, function: Callable[[Rows, torch.Generator], Tensor]
    ) -> Tensor:
        """[B, L] of a function that takes rows up to their ends, where it goes on as `into`."""
        if not self.is_own:
            return function((slice(None), slice(None)), self.generators[0])
        result = into.clone()
        for b, (one, length) in enumerate(zip(self.generators, self.lengths, strict=True)):
            rows = slice(b, b + 1), slice(length)
            result[rows] = function(rows, one)
        return result

    def runs(self, counts: Sequence[int], rows: Sequence[int]) -> list[Run]:
        """The runs of things of which so many stand in each of some of the B rows, row by row."""
        if not self.is_own:
            return [(sum(counts), self.generators[0])]
        return [(count, self.generators[row]) for count, row in zip(counts, rows, strict=True)]

    @staticmethod
    def together(runs: list[Run]) -> list[Run]:
        """The same things as one run, for what draws nothing."""
        return [(sum(count for count, _ in runs), runs[0][1])]
