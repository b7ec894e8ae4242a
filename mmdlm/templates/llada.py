"""Lay out prompts of LLaDA and LLaDA 1.5: Llama 3's headers around each turn."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from mmdlm.core.sequence import Sequence, text_segment
from mmdlm.templates.prompt_template import Generation, PromptTemplate, Specials
from mmdlm.templates.segments import Piece, answering, learned_segments, segments_of
from mmdlm.templates.task_prompt import ImageInput, TaskPrompt, Turn
from mmdlm.templates.text_codec import TextCodec


class Llada(PromptTemplate):
    """Write `bos, header role header, content, end of turn`, one turn after the other.

    Departures: The published template ends every conversation with the assistant's header, also one
    that is trained on; here it stands only where an answer is generated.

    Attributes:
        gap: Between a header and what is said.
        system: Said first if the conversation has no system message; None: nothing.
    """

    family: ClassVar[str] = "llada"
    tasks: ClassVar[tuple[str, ...]] = ("answer", "chat", "complete", "infill")
    specials: ClassVar[Specials] = {
        "bos": (("<|startoftext|>",), 126080),
        "start_header": (("<|start_header_id|>",), 126346),
        "end_header": (("<|end_header_id|>",), 126347),
        "eot": (("<|eot_id|>",), 126348),
    }
    generation: ClassVar[Generation] = {
        "answer": {"num_inference_steps": 128, "block_length": 32},
        "complete": {"num_inference_steps": 128},
        "infill": {"num_inference_steps": 128},
        "max_new_tokens": 128,
    }
    gap: ClassVar[str] = "\n\n"
    system: ClassVar[str | None] = None

    def chat_prompt(self, codec: TextCodec, turns: tuple[Turn, ...], *, length: int) -> TaskPrompt:
        """Ask for the next turn of the assistant."""
        return answering(codec, segments_of(codec, self.prompt(codec, turns)), length=length)

    def prompt(self, codec: TextCodec, turns: tuple[Turn, ...]) -> list[Piece]:
        """Return the conversation up to where the assistant's next turn begins."""
        said = [piece for piece, _ in self.script(codec, turns)]
        return [*said, *self._header(codec, "assistant")]

    def training_sequence(
        self, codec: TextCodec, turns: tuple[Turn, ...], *, answers: Collection[int]
    ) -> Sequence:
        """Lay out a conversation to learn from; an answer ends with the end of its turn."""
        return Sequence(learned_segments(codec, self.script(codec, turns, answers=answers)))

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
        special = self.ids(codec, *Llada.specials)  # those of drawing are not needed to talk
        numbered = list(enumerate(turns))
        if self.system is not None and turns[0].role != "system":
            numbered.insert(0, (-1, Turn("system", (self.system,))))
        pieces: list[tuple[Piece, bool]] = [(special["bos"], False)]
        for number, turn in numbered:
            pieces += [(piece, False) for piece in self._header(codec, turn.role)]
            pieces += [(piece, number in answers) for piece in (*turn.parts, special["eot"])]
        return pieces

    def _header(self, codec: TextCodec, role: str) -> tuple[Piece, ...]:
        special = self.ids(codec, "start_header", "end_header")
        return special["start_header"], role, special["end_header"], self.gap

    def completion_prompt(self, codec: TextCodec, text: str, *, length: int) -> TaskPrompt:
        """Ask for what follows a text, with nothing before it."""
        return answering(codec, (text_segment(codec.encode(text)),), length=length)

    def infill_prompt(
        self, codec: TextCodec, text: str, *, image: ImageInput | None = None
    ) -> TaskPrompt:
        """Fill in a text, whose end is given."""
        assert image is None, "LLaDA sees no images"
        ids, hole = codec.parse_infill_template(text)
        end = text_segment([codec.vocabulary.eos_id])
        sequence = Sequence((text_segment(ids, target=hole), end))
        return TaskPrompt(sequence, (sequence,), output_segments=(0,))

    def stop_ids(self, codec: TextCodec) -> tuple[int, ...]:
        """Return the end of a text and the end of a turn, if the tokenizer has one."""
        names, _ = self.specials["eot"]
        end = codec.first_of(names)
        return (codec.vocabulary.eos_id,) if end is None else (codec.vocabulary.eos_id, end)
