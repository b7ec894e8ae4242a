"""The layout of models trained here that see: the features of a picture, then its text."""

from __future__ import annotations

from typing import ClassVar

from mmdlm.core.sequence import Sequence, picture_segment
from mmdlm.layouts.layout import Ask, Codes, Picture, Sight, answer_segment, without_prompt
from mmdlm.layouts.own import Own
from mmdlm.layouts.words import Words


class OwnSeeing(Own):
    """`features, text`, as `data_pipelines.seen.SeenCaption` lays them out for training.

    Other tasks have no pictures: a text is laid out as for a model of text alone.
    """

    family: ClassVar[str] = "mmdlm-seeing"
    sees: ClassVar[Sight] = "features"
    tasks: ClassVar[tuple[str, ...]] = ("caption", "complete")

    def describe(self, words: Words, picture: Picture, *, length: int) -> Ask:
        """The text is open; in the other branch it stands without the picture."""
        assert not isinstance(picture, Codes)
        seen = picture_segment(picture, words.vocabulary)
        sequence = Sequence((seen, answer_segment(words, length)))
        return Ask(sequence, (without_prompt(sequence, words),), shown=(1,))
