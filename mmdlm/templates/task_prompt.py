"""Lay out one task: images as codes, turns of a conversation, a document with its targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmdlm.core.sequence import Segment, Sequence, Views, text_segment
from mmdlm.core.vocabulary import Modality
from mmdlm.templates.text_codec import TextCodec


@dataclass(frozen=True)
class Codes:
    """An image as ids of its codes, in reading order.

    Attributes:
        ids: [K] int64; mask tokens where `open`.
        open: [K] bool, codes to be drawn.
        grid: (rows, columns), K codes.
    """

    ids: Tensor
    open: Tensor
    grid: tuple[int, int]

    @classmethod
    def given(cls, ids: Tensor, grid: tuple[int, int]) -> Codes:
        """Return an image whose codes are all given."""
        return cls(ids, torch.zeros(ids.shape, dtype=torch.bool), grid)

    @classmethod
    def blank(cls, codec: TextCodec, grid: tuple[int, int], *, drawn: bool = False) -> Codes:
        """Return an image of which nothing is known; `drawn`: it is to be drawn."""
        ids = codec.masks(grid[0] * grid[1])
        return cls(ids, torch.full(ids.shape, drawn), grid)


ImageInput = Codes | Views


@dataclass(frozen=True)
class Turn:
    """What one side says in a conversation.

    Attributes:
        role: "system", "user", "assistant" or "tool".
        parts: Text and images in reading order.
        fields: Other keys of the message, which a chat template may read: tool_calls,
            tool_call_id, name.
    """

    role: str
    parts: tuple[str | ImageInput, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskPrompt:
    """A task, laid out.

    Attributes:
        sequence: The document, with its targets.
        unconditional: The other branches of guidance, each with as many targets in the same order.
        output_segments: Numbers of the segments of `sequence` that hold the result.
    """

    sequence: Sequence
    unconditional: tuple[Sequence, ...]
    output_segments: tuple[int, ...]

    @property
    def open(self) -> Tensor:
        """Ids of the result that are generated, [R] bool; the others stay as they are."""
        return torch.cat([self.sequence.segments[number].target for number in self.output_segments])


def said(turn: Turn) -> str:
    """Return the words of a turn."""
    return "".join(part for part in turn.parts if isinstance(part, str)).strip()


def answer_segment(codec: TextCodec, length: int) -> Segment:
    """Return a segment of `length` text tokens to be generated."""
    return text_segment(codec.masks(length), target=True)


def without_prompt(sequence: Sequence, codec: TextCodec) -> Sequence:
    """Return the twin for guidance: all that is no target is a mask token, images included.

    Source: arXiv:2410.18514, section 3.3, as LLaDA, MMaDA and LLaDA-V have it.
    """
    target = torch.cat([segment.target for segment in sequence.segments])
    ids = torch.cat([segment.ids for segment in sequence.segments])
    ids = ids.masked_fill(~target, codec.vocabulary.mask_id)
    return Sequence((Segment(Modality.TEXT, ids, target),))
