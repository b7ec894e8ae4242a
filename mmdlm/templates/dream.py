"""Lay out prompts of Dream: Qwen's ChatML; a token precedes every text.

Each state predicts the next token, so that the first word needs a token before it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from mmdlm.core.sequence import Sequence, text_segment
from mmdlm.templates.prompt_template import Generation, PromptTemplate, Specials
from mmdlm.templates.segments import Piece, answering, learned_segments, segments_of
from mmdlm.templates.task_prompt import ImageInput, TaskPrompt, Turn
from mmdlm.templates.text_codec import TextCodec

# Dream's own way to sample: the share of a linear schedule, least entropy first, after temperature
# and top-p. Source: arXiv:2508.15487 and its published code.
DECODING = {
    "reproduce": "dream",
    "order": "entropy",
    "temperature": 0.2,
    "top_p": 0.95,
}


class Dream(PromptTemplate):
    """Write `<|im_start|>role, content <|im_end|>`, one turn after the other."""

    family: ClassVar[str] = "dream"
    tasks: ClassVar[tuple[str, ...]] = ("answer", "chat", "complete", "infill")
    specials: ClassVar[Specials] = {
        "im_start": (("<|im_start|>",), 151644),
        "im_end": (("<|im_end|>",), 151645),
    }
    generation: ClassVar[Generation] = {
        "answer": {"num_inference_steps": 512, **DECODING},
        "complete": {"num_inference_steps": 512, **DECODING},
        # a hole is short: one by one
        "infill": {"num_inference_steps": 512, "order": "entropy"},
        "max_new_tokens": 512,
    }
    system: ClassVar[str] = "You are a helpful assistant."

    def chat_prompt(self, codec: TextCodec, turns: tuple[Turn, ...], *, length: int) -> TaskPrompt:
        """Ask for the next turn of the assistant."""
        return answering(codec, segments_of(codec, self.prompt(codec, turns)), length=length)

    def prompt(self, codec: TextCodec, turns: tuple[Turn, ...]) -> list[Piece]:
        """Return the conversation up to where the assistant's next turn begins."""
        said = [piece for piece, _ in self.script(codec, turns)]
        return [*said, self.ids(codec, "im_start")["im_start"], "assistant", "\n"]

    def training_sequence(
        self, codec: TextCodec, turns: tuple[Turn, ...], *, answers: Collection[int]
    ) -> Sequence:
        """Lay out a conversation to learn from; an answer ends with the end of its turn."""
        pieces = self.script(codec, turns, answers=answers)
        return Sequence(learned_segments(codec, _without_tail(pieces)))

    def script(
        self, codec: TextCodec, turns: tuple[Turn, ...], *, answers: Collection[int] = ()
    ) -> list[tuple[Piece, bool]]:
        """Return the conversation piece by piece, each with whether it is learned.

        Args:
            codec: The text tokenizer.
            turns: The conversation.
            answers: Numbers of the turns that are learned, each with its end.

        Returns:
            (piece, is learned) in order.
        """
        special = self.ids(codec, "im_start", "im_end")
        numbered = list(enumerate(turns))
        if self.system and turns[0].role != "system":
            numbered.insert(0, (-1, Turn("system", (self.system,))))
        pieces: list[tuple[Piece, bool]] = []
        for number, turn in numbered:
            pieces += [(special["im_start"], False), (turn.role, False), ("\n", False)]
            pieces += [(piece, number in answers) for piece in (*turn.parts, special["im_end"])]
            pieces.append(("\n", False))
        return pieces

    def completion_prompt(self, codec: TextCodec, text: str, *, length: int) -> TaskPrompt:
        """Ask for what follows a text, which stands after a first token."""
        prompt = text_segment([_first(codec), *codec.encode(text)])
        return answering(codec, (prompt,), length=length)

    def infill_prompt(
        self, codec: TextCodec, text: str, *, image: ImageInput | None = None
    ) -> TaskPrompt:
        """Fill in a text between a first token and its end."""
        assert image is None, "Dream sees no images"
        ids, hole = codec.parse_infill_template(text)
        sequence = Sequence(
            (
                text_segment([_first(codec)]),
                text_segment(ids, target=hole),
                text_segment([codec.vocabulary.eos_id]),
            )
        )
        return TaskPrompt(sequence, (sequence,), output_segments=(1,))

    def stop_ids(self, codec: TextCodec) -> tuple[int, ...]:
        """Return the end of a text and the end of a turn, if the tokenizer has one."""
        names, _ = self.specials["im_end"]
        end = codec.first_of(names)
        return (codec.vocabulary.eos_id,) if end is None else (codec.vocabulary.eos_id, end)


def _without_tail(pieces: list[tuple[Piece, bool]]) -> list[tuple[Piece, bool]]:
    """Return the pieces up to the last that is learned, without what opens the next turn."""
    last = max(number for number, (_, learned) in enumerate(pieces) if learned)
    return pieces[: last + 1]


def _first(codec: TextCodec) -> int:
    """Return the token before a text: its state predicts the first word."""
    bos: int | None = codec.tokenizer.bos_token_id
    return codec.vocabulary.eos_id if bos is None else bos
