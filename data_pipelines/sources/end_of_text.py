"""What follows the last answer of a conversation: ends of text, which are targets too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


class Tail(ABC):
    """How many ends of text follow an answer, so that a model learns where to stop.

    A masked-diffusion model writes into a canvas of a given length; what it puts behind an answer
    that is shorter, and so how long its answers are, it learns here.
    """

    def check(self, *, packed: bool) -> None:
        """Raise ValueError where the tail has no meaning for the rows; most have for any."""
        return

    @abstractmethod
    def count(self, *, answer: int, room: int, generator: torch.Generator) -> int:
        """Return how many end-of-text tokens follow an answer; at most `room` are written.

        Args:
            answer: Tokens of the answer, with what ends it.
            room: Tokens that are left of the row behind it.
            generator: Random numbers.

        Returns:
            At least 0.
        """


@dataclass(frozen=True)
class NoTail(Tail):
    """Nothing behind what ends an answer in its layout."""

    def count(self, *, answer: int, room: int, generator: torch.Generator) -> int:
        return 0


@dataclass(frozen=True)
class FixedTail(Tail):
    """As many ends of text behind every answer."""

    tokens: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"FixedTail: tokens is {self.tokens}; 1 is the least, else NoTail")

    def count(self, *, answer: int, room: int, generator: torch.Generator) -> int:
        return self.tokens


@dataclass(frozen=True)
class FilledTail(Tail):
    """Ends of text to the end of the row: padding that is learned, and counts as answer.

    Attributes:
        longest: Most of them; None: as many as fit.

    Source: arXiv:2502.09992, section 2.3 and appendix B.1, which fills up to the longest document
    of a batch; here rows have one length, as in d1's fine-tuning (arXiv:2504.12216).
    """

    longest: int | None = None

    def __post_init__(self) -> None:
        if self.longest is not None and self.longest < 1:
            raise ValueError(f"FilledTail: longest is {self.longest}; 1 is the least, else NoTail")

    def check(self, *, packed: bool) -> None:
        if packed and self.longest is None:
            raise ValueError(
                "FilledTail fills the whole row, which leaves nothing to pack: give it `longest`, "
                "take RandomTail, or set packed to false"
            )

    def count(self, *, answer: int, room: int, generator: torch.Generator) -> int:
        return room if self.longest is None else self.longest


@dataclass(frozen=True)
class RandomTail(Tail):
    """Up to a random length between that of the answer, its end counted, and a round number.

    That is the next power of two up to 16, and the next multiple of 16 from there on. It keeps a
    model from taking the length of its canvas for that of the answer.
    Source: arXiv:2505.16990, section 3.2, and its published code.
    """

    def count(self, *, answer: int, room: int, generator: torch.Generator) -> int:
        most = self.bound(answer) - answer
        return int(torch.randint(most + 1, (), generator=generator))

    @staticmethod
    def bound(answer: int) -> int:
        """Return the next round number, or the length itself where it is one."""
        if answer < 16:
            return 1 << max(0, answer - 1).bit_length()
        return -(-answer // 16) * 16
