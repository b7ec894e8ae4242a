"""Lay out prompts of Dimple: Dream's conversation, with Qwen2-VL's markers around each image."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from mmdlm.core.sequence import Sequence, text_segment
from mmdlm.templates.dream import Dream
from mmdlm.templates.prompt_template import Generation, Sight, Specials
from mmdlm.templates.segments import Piece, segments_of
from mmdlm.templates.task_prompt import ImageInput, TaskPrompt, Turn, without_prompt
from mmdlm.templates.text_codec import TextCodec

CAPTION = "Describe this image."
# Confident decoding: all tokens that the model is sure of, or one at random where there is none.
# Source: arXiv:2505.16990, section 3.3; the numbers are those of its model card. The published
# benchmarks were decoded in another way: 8 tokens in 8 steps, the most likely ones first.
DECODING = {
    "num_inference_steps": 64,
    "reproduce": "dimple",
    "order": "random",
    "threshold": 0.95,
    "threshold_exclusive": True,
    "temperature": 0.2,
    "top_p": 0.95,
}


class Dimple(Dream):
    """Put each image between the begin and the end of vision.

    It was trained to end an answer with the end of text, and to leave out the end of the turn,
    which the published template has all the same.
    """

    family: ClassVar[str] = "dimple"
    sees: ClassVar[Sight] = "features"
    tasks: ClassVar[tuple[str, ...]] = ("caption", "answer", "chat", "complete", "infill")
    specials: ClassVar[Specials] = {
        **Dream.specials,
        "vision_start": (("<|vision_start|>",), 151652),
        "vision_end": (("<|vision_end|>",), 151653),
    }
    generation: ClassVar[Generation] = {
        "caption": DECODING,
        "answer": DECODING,
        "complete": DECODING,
        "infill": DECODING,
        "max_text_tokens": 64,
        "max_new_tokens": 64,
    }

    def script(
        self, codec: TextCodec, turns: tuple[Turn, ...], *, answers: Collection[int] = ()
    ) -> list[tuple[Piece, bool]]:
        """Return the conversation piece by piece; ends of turns are not learned."""
        special = self.ids(codec)
        pieces: list[tuple[Piece, bool]] = []
        for piece, learned in super().script(codec, turns, answers=answers):
            if isinstance(piece, int | str):
                pieces.append((piece, learned and piece != special["im_end"]))
            else:
                around = (special["vision_start"], piece, special["vision_end"])
                pieces += [(one, False) for one in around]
        return pieces

    def training_sequence(
        self, codec: TextCodec, turns: tuple[Turn, ...], *, answers: Collection[int]
    ) -> Sequence:
        """Lay out a conversation to learn from; only the last answer ends the text."""
        taught = super().training_sequence(codec, turns, answers=answers)
        end = text_segment([codec.vocabulary.eos_id], target=True)
        return Sequence((*taught.segments, end))

    def caption_prompt(self, codec: TextCodec, image: ImageInput, *, length: int) -> TaskPrompt:
        """Ask for a caption in a conversation."""
        return self.chat_prompt(codec, (_asked(image),), length=length)

    def infill_prompt(
        self, codec: TextCodec, text: str, *, image: ImageInput | None = None
    ) -> TaskPrompt:
        """Fill in a text; with an image it is the assistant's description of it."""
        if image is None:
            return super().infill_prompt(codec, text)
        ids, hole = codec.parse_infill_template(text)
        before = segments_of(codec, self.prompt(codec, (_asked(image),)))
        end = text_segment([codec.vocabulary.eos_id])
        sequence = Sequence((*before, text_segment(ids, target=hole), end))
        return TaskPrompt(
            sequence, (without_prompt(sequence, codec),), output_segments=(len(before),)
        )


def _asked(image: ImageInput) -> Turn:
    return Turn("user", (image, CAPTION))
