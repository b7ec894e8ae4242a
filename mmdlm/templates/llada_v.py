"""Lay out prompts of LLaDA-V: LLaDA's conversation with images where they are spoken of."""

from __future__ import annotations

from typing import ClassVar

from mmdlm.core.sequence import Sequence, text_segment
from mmdlm.templates.llada import Llada
from mmdlm.templates.prompt_template import Generation, Sight
from mmdlm.templates.segments import segments_of
from mmdlm.templates.task_prompt import ImageInput, TaskPrompt, Turn, without_prompt
from mmdlm.templates.text_codec import TextCodec

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
CAPTION = "Please describe the image in detail."


class LladaV(Llada):
    """Lay out several turns and any number of images, each as the slots of its features.

    Its loss also covers headers and `bos`, so that it would generate them; they are suppressed, and
    so is the end of text, which leaves the end of the turn.

    Source: published code of arXiv:2505.16933.
    """

    family: ClassVar[str] = "llada_v"
    sees: ClassVar[Sight] = "features"
    tasks: ClassVar[tuple[str, ...]] = ("caption", "answer", "chat", "complete", "infill")
    generation: ClassVar[Generation] = {
        "caption": {"num_inference_steps": 128},
        "answer": {"num_inference_steps": 128},
        "complete": {"num_inference_steps": 128},
        "infill": {"num_inference_steps": 128},
        "max_text_tokens": 128,
        "max_new_tokens": 128,
    }
    system: ClassVar[str | None] = SYSTEM

    def caption_prompt(self, codec: TextCodec, image: ImageInput, *, length: int) -> TaskPrompt:
        """Ask for a caption in a conversation."""
        return self.chat_prompt(codec, (_asked(image),), length=length)

    def thinking(self, turns: tuple[Turn, ...], think: bool | None) -> tuple[Turn, ...]:
        """Put a mark after the last question."""
        if think is None:
            return turns
        *before, last = turns
        return *before, Turn(last.role, (*last.parts, " /think" if think else " /no_think"))

    def infill_prompt(
        self, codec: TextCodec, text: str, *, image: ImageInput | None = None
    ) -> TaskPrompt:
        """Fill in a text; with an image it is the assistant's description of it."""
        if image is None:
            return super().infill_prompt(codec, text)
        ids, hole = codec.parse_infill_template(text)
        prompt = segments_of(codec, self.prompt(codec, (_asked(image),)))
        end = text_segment([self.ids(codec, "eot")["eot"]])
        sequence = Sequence((*prompt, text_segment(ids, target=hole), end))
        return TaskPrompt(
            sequence, (without_prompt(sequence, codec),), output_segments=(len(prompt),)
        )

    def suppress_tokens(self, codec: TextCodec) -> tuple[int, ...]:
        """Return headers, `bos` and the end of text."""
        special = self.ids(codec, "bos", "start_header", "end_header")
        return (*special.values(), codec.vocabulary.eos_id)


def _asked(image: ImageInput) -> Turn:
    return Turn("user", (image, "\n" + CAPTION))
