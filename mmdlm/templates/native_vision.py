"""Lay out prompts of models trained here that see: the features of an image, then its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmdlm.core.sequence import Sequence, image_segment, text_segment
from mmdlm.templates.native import DESCRIBE, Native
from mmdlm.templates.prompt_template import Sight
from mmdlm.templates.task_prompt import (
    Codes,
    ImageInput,
    TaskPrompt,
    Turn,
    answer_segment,
    said,
    without_prompt,
)
from mmdlm.templates.text_codec import TextCodec


@dataclass(frozen=True)
class NativeVision(Native):
    """Write `features, text`, as `data_pipelines.sources.vision_samples.SeenCaption` does.

    Other tasks have no images: a text is laid out as for a model of text only.
    """

    family: ClassVar[str] = "mmdlm-seeing"
    sees: ClassVar[Sight] = "features"
    tasks: ClassVar[tuple[str, ...]] = ("caption", "complete")
    spoken_tasks: ClassVar[tuple[str, ...]] = ("answer", "chat")

    def caption_prompt(self, codec: TextCodec, image: ImageInput, *, length: int) -> TaskPrompt:
        """Leave the text open; in the other branch it stands without the image; see `Native`."""
        if not self.captions:
            return self.chat_prompt(codec, (Turn("user", (image, DESCRIBE)),), length=length)
        assert not isinstance(image, Codes)
        seen = image_segment(image, codec.vocabulary)
        sequence = Sequence((seen, answer_segment(codec, length)))
        return TaskPrompt(sequence, (without_prompt(sequence, codec),), output_segments=(1,))

    def caption_sequence(self, codec: TextCodec, question: Turn, answer: Turn) -> Sequence:
        """Lay out an image without words and its caption, as `caption` asks for it."""
        if len(question.parts) > 1:
            self.unsupported("questions about images without a template")
        (image,) = question.parts
        assert not isinstance(image, str)
        ids = [*codec.encode(said(answer)), codec.vocabulary.eos_id]
        seen, _ = self.caption_prompt(codec, image, length=len(ids)).sequence.segments
        return Sequence((seen, text_segment(ids, target=True)))
