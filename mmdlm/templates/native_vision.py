"""The layout of models trained here that see: the features of a picture, then its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.core.sequence import Sequence, picture_segment, text_segment
from mmdlm.templates.native import DESCRIBE, Own
from mmdlm.templates.prompt_template import (
    Ask,
    Codes,
    Picture,
    Sight,
    Turn,
    answer_segment,
    said,
    without_prompt,
)
from mmdlm.templates.text_codec import Words


@dataclass(frozen=True)
class OwnSeeing(Own):
    """`features, text`, as `data_pipelines.sources.vision_samples.SeenCaption` lays them out for
    training.

    Other tasks have no pictures: a text is laid out as for a model of text alone.
    """

    family: ClassVar[str] = "mmdlm-seeing"
    sees: ClassVar[Sight] = "features"
    tasks: ClassVar[tuple[str, ...]] = ("caption", "complete")
    spoken_tasks: ClassVar[tuple[str, ...]] = ("answer", "chat")

    def describe(self, words: Words, picture: Picture, *, length: int) -> Ask:
        """The text is open; in the other branch it stands without the picture; see `Own`."""
        if not self.captions:
            return self.reply(words, (Turn("user", (picture, DESCRIBE)),), length=length)
        assert not isinstance(picture, Codes)
        seen = picture_segment(picture, words.vocabulary)
        sequence = Sequence((seen, answer_segment(words, length)))
        return Ask(sequence, (without_prompt(sequence, words),), shown=(1,))

    def teach_caption(self, words: Words, question: Turn, answer: Turn) -> Sequence:
        """An image without words, and its caption, as `describe` asks for it."""
        if len(question.parts) > 1:
            self.cannot("questions about images without a template")
        (picture,) = question.parts
        assert not isinstance(picture, str)
        ids = [*words.spoken(said(answer)), words.vocabulary.eos_id]
        seen, _ = self.describe(words, picture, length=len(ids)).sequence.segments
        return Sequence((seen, text_segment(ids, target=True)))
