"""The layout of models trained here: begin image, codes, end image, text."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.core.sequence import Segment, Sequence, control_segment, text_segment
from mmdlm.core.vocabulary import Modality
from mmdlm.layouts.layout import (
    Ask,
    Codes,
    Layout,
    Picture,
    Sight,
    Turn,
    answer_segment,
    said,
)
from mmdlm.layouts.words import Words


class Own(Layout):
    """One layout for all tasks: a task is only the choice of which of its tokens are targets.

    What is not known (the picture of a text to be filled in, the words of a picture to be mended)
    stands there as mask tokens.
    """

    family: ClassVar[str] = "mmdlm"
    sees: ClassVar[Sight] = "codes"
    tasks: ClassVar[tuple[str, ...]] = (
        "caption",
        "text_to_image",
        "draw_trajectory",
        "inpaint",
        "infill",
        "complete",
    )

    def describe(self, words: Words, picture: Picture, *, length: int) -> Ask:
        """The text is open; without the picture it is open too, in the other branch."""
        assert isinstance(picture, Codes)
        text, everything = words.masks(length), torch.ones(length, dtype=torch.bool)
        return _ask(
            _document(words, picture, text, write=everything),
            _document(words, Codes.blank(words, picture.grid), text, write=everything),
        )

    def draw(self, words: Words, prompt: str, *, picture: Codes, negative: str = "") -> Ask:
        """The text is context; the rest of the picture stays in both branches."""
        text = words.closed(words.prompt(prompt))
        nothing = torch.full_like(text, words.vocabulary.mask_id)
        against = words.closed(words.prompt(negative)) if negative.strip() else nothing
        document = _document(words, picture, text if prompt.strip() else nothing)
        return Ask(document, (_document(words, picture, against),), shown=(1,))

    def infill(self, words: Words, text: str, *, picture: Picture | None = None) -> Ask:
        """The holes are open; without the picture they are open too, in the other branch."""
        assert picture is None or isinstance(picture, Codes)
        ids, hole = words.template(text)
        return _write(words, words.closed(ids), hole, picture)

    def complete(self, words: Words, text: str, *, length: int) -> Ask:
        """What follows the text is open, to the end of the slots where there are slots."""
        ids = words.prompt(text)
        length = min(length, (words.slots or words.longest + 1) - len(ids))
        rest = 0 if words.slots is None else words.slots - len(ids) - length
        segments = (
            *_beside(words, _nothing(words)),
            text_segment(ids),
            answer_segment(words, length),
            text_segment([words.vocabulary.eos_id] * rest),
        )
        return Ask(Sequence(segments), (Sequence(segments),), shown=(len(segments) - 2,))

    def teach(self, words: Words, turns: tuple[Turn, ...], *, answers: Collection[int]) -> Sequence:
        """One question and what is to follow it, as `complete` and `draw` have it."""
        if len(turns) != 2 or list(answers) != [1]:
            raise ValueError(
                f"this model ({self.family}) learns one question with its answer, not "
                f"{len(turns)} messages"
            )
        if drawn := self.drawing(turns):
            prompt, thought, picture = drawn
            if thought:
                self.cannot("words beside a picture")
            return self.draw(words, prompt, picture=picture).sequence
        if any(not isinstance(part, str) for part in turns[0].parts):
            self.cannot("questions about pictures")
        ids = [*words.spoken(said(turns[1])), words.vocabulary.eos_id]
        sequence = self.complete(words, said(turns[0]), length=len(ids)).sequence
        *before, answer, rest = sequence.segments
        if len(answer.ids) < len(ids):
            raise ValueError(f"{len(ids)} tokens of an answer are too many for this model")
        filled = text_segment([*ids, *rest.ids.tolist()], target=True)
        return Sequence((*before, filled))

    def completion(self, words: Words, text: str, ids: Tensor) -> str:
        """A model is shown a text without space at its end: what follows brings its own."""
        said = self.continued(words, ids)
        return said.removeprefix(" ") if text[-1:].isspace() else said

    def decode(self, words: Words, ids: Tensor) -> str:
        """Special tokens that a text names are part of it."""
        ended = (ids == words.vocabulary.eos_id).nonzero()
        stop = int(ended[0]) if len(ended) else len(ids)
        return str(words.tokenizer.decode(ids[:stop].tolist()))


def _write(words: Words, text: Tensor, hole: Tensor, picture: Codes | None) -> Ask:
    """A text whose beginning [n] has holes, under a picture."""
    write = torch.zeros(text.shape, dtype=torch.bool)
    write[: len(hole)] = hole
    nothing = _nothing(words) if picture is None else Codes.blank(words, picture.grid)
    return _ask(
        _document(words, picture or nothing, text, write=write),
        _document(words, nothing, text, write=write),
    )


def _nothing(words: Words) -> Codes | None:
    """What stands beside a text alone: a model of fixed slots has always seen a picture."""
    if words.grid is None or words.slots is None:
        return None
    return Codes.blank(words, words.grid)


def _ask(document: Sequence, opposite: Sequence) -> Ask:
    """The text is the result: it is the last segment."""
    return Ask(document, (opposite,), shown=(len(document.segments) - 1,))


def _document(
    words: Words, picture: Codes | None, text: Tensor, *, write: Tensor | None = None
) -> Sequence:
    """`begin image, codes [K], end image, text [T]`, all of them ids.

    write  [T] bool, which tokens of the text are targets; None: none
    """
    context = torch.zeros(text.shape, dtype=torch.bool)
    written = Segment(Modality.TEXT, text, context if write is None else write)
    return Sequence((*_beside(words, picture), written))


def _beside(words: Words, picture: Codes | None) -> tuple[Segment, ...]:
    if picture is None:
        return ()
    begin, end = map(control_segment, words.vocabulary.image_markers)
    return begin, Segment(Modality.IMAGE, picture.ids, picture.open), end
