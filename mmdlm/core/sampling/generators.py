"""Draw the random numbers of a batch from one generator for all rows, or from one for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]
Rows = tuple[slice, slice]  # of a tensor [B, L]: which rows, and how far into them
Run = tuple[int, torch.Generator]  # of things one after the other: how many one generator draws for


def check_generators(given: object, rows: int) -> None:
    """Raise ValueError unless `given` is a generator, or a list of one for each of `rows` rows."""
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

    Attributes:
        generators: One for all rows, or one for each.
        lengths: Tokens of each row, if it has its own generator. It draws only for these, as if
            there were no other row and so no padding. Empty: there is one generator for all rows.
    """

    generators: tuple[torch.Generator, ...]
    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, given: Generators, lengths: Tensor) -> RowGenerators:
        """Take the generators of a caller for rows of some lengths.

        Args:
            given: One for all rows, or a list of one for each.
            lengths: [B] on the host, tokens of each row.

        Returns:
            One generator, or one for each row with the tokens of the row.

        Raises:
            ValueError: See `check_generators`.
        """
        check_generators(given, len(lengths))
        if isinstance(given, torch.Generator):
            return cls((given,))
        return cls(tuple(given), tuple(lengths.numpy().tolist()))

    @property
    def is_own(self) -> bool:
        """Whether each row has a generator of its own."""
        return len(self.generators) == len(self.lengths)

    def spans(self) -> list[tuple[Rows, torch.Generator]]:
        """Return the parts of a tensor [B, L] that one generator draws for, each with it.

        Without padding, where each row has its own generator.
        """
        if not self.is_own:
            return [((slice(None), slice(None)), self.generators[0])]
        return [
            ((slice(b, b + 1), slice(length)), one)
            for b, (one, length) in enumerate(zip(self.generators, self.lengths, strict=True))
        ]

    def runs(self, counts: Sequence[int], rows: Sequence[int]) -> list[Run]:
        """Return the runs of things of which `counts` stand in each of some rows, row by row."""
        if not self.is_own:
            return [(sum(counts), self.generators[0])]
        return [(count, self.generators[row]) for count, row in zip(counts, rows, strict=True)]

    @staticmethod
    def together(runs: list[Run]) -> list[Run]:
        """Return the same things as one run, for what draws nothing."""
        return [(sum(count for count, _ in runs), runs[0][1])]
