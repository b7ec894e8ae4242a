"""LLaDA and LLaDA 1.5: Llama 3's headers around each turn; texts alone as they are."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from mmdlm.core.sequence import Sequence, text_segment
from mmdlm.templates.prompt_template import Ask, Generation, Layout, Picture, Specials, Turn
from mmdlm.templates.segments import Piece, answering, learnt_segments, segments_of
from mmdlm.templates.text_codec import Words


class Llada(Layout):
    """`bos, header role header, content, end of turn`, a turn after the other.

    The published template ends every conversation with the assistant's header, also one that is
    trained on; here it stands where an answer is generated, and nowhere else.

    gap     between a header and what is said
    system  said first where the conversation has no system message; None: nothing
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

    def reply(self, words: Words, turns: tuple[Turn, ...], *, length: int) -> Ask:
        """See `Layout.reply`."""
        return answering(words, segments_of(words, self.prompt(words, turns)), length=length)

    def prompt(self, words: Words, turns: tuple[Turn, ...]) -> list[Piece]:
        """A conversation up to where the assistant's next turn begins."""
        said = [piece for piece, _ in self.script(words, turns)]
        return [*said, *self._header(words, "assistant")]

    def teach(self, words: Words, turns: tuple[Turn, ...], *, answers: Collection[int]) -> Sequence:
        """See `Layout.teach`; an answer ends with the end of its turn."""
        return Sequence(learnt_segments(words, self.script(words, turns, answers=answers)))

    def script(
        self, words: Words, turns: tuple[Turn, ...], *, answers: Collection[int] = ()
    ) -> list[tuple[Piece, bool]]:
        """A conversation piece by piece, each with whether it is to be learnt.

        answers  numbers of the turns that are, each with its end
        """
        special = self.ids(words, *Llada.specials)  # those of drawing are not needed to talk
        numbered = list(enumerate(turns))
        if self.system is not None and turns[0].role != "system":
            numbered.insert(0, (-1, Turn("system", (self.system,))))
        pieces: list[tuple[Piece, bool]] = [(special["bos"], False)]
        for number, turn in numbered:
            pieces += [(piece, False) for piece in self._header(words, turn.role)]
            pieces += [(piece, number in answers) for piece in (*turn.parts, special["eot"])]
        return pieces

    def _header(self, words: Words, role: str) -> tuple[Piece, ...]:
        special = self.ids(words, "start_header", "end_header")
        return special["start_header"], role, special["end_header"], self.gap

    def complete(self, words: Words, text: str, *, length: int) -> Ask:
        """The text and nothing before it."""
        return answering(words, (text_segment(words.spoken(text)),), length=length)

    def infill(self, words: Words, text: str, *, picture: Picture | None = None) -> Ask:
        """The text, and that it ends."""
        assert picture is None, "LLaDA sees no pictures"
        ids, hole = words.template(text)
        end = text_segment([words.vocabulary.eos_id])
        sequence = Sequence((text_segment(ids, target=hole), end))
        return Ask(sequence, (sequence,), shown=(0,))

    def ends(self, words: Words) -> tuple[int, ...]:
        """The end of a turn, where the tokenizer has one, and the end of a text."""
        names, _ = self.specials["eot"]
        end = words.first_of(names)
        return (words.vocabulary.eos_id,) if end is None else (words.vocabulary.eos_id, end)
