"""Dream: Qwen's ChatML; every text begins with a token, as each state predicts the next one."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from mmdlm.core.sequence import Sequence, text_segment
from mmdlm.templates.prompt_template import Ask, Generation, Layout, Picture, Specials, Turn
from mmdlm.templates.segments import Piece, answering, learnt_segments, segments_of
from mmdlm.templates.text_codec import Words

# Dream's own way to decode: the share of a linear schedule, least entropy first, both looked at
# after temperature and top-p, which comes before top-k where there is one. Source: arXiv:2508.15487
# and its published code.
DECODING = {
    "schedule": "expected",
    "order": "entropy",
    "order_after_temperature": True,
    "temperature": 0.2,
    "top_p": 0.95,
    "top_p_first": True,
}


class Dream(Layout):
    """`<|im_start|>role, content <|im_end|>`, a turn after the other."""

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
        "infill": {"num_inference_steps": 512, "order": "entropy", "top_p_first": True},
        "max_new_tokens": 512,
    }
    system: ClassVar[str] = "You are a helpful assistant."

    def reply(self, words: Words, turns: tuple[Turn, ...], *, length: int) -> Ask:
        """See `Layout.reply`."""
        return answering(words, segments_of(words, self.prompt(words, turns)), length=length)

    def prompt(self, words: Words, turns: tuple[Turn, ...]) -> list[Piece]:
        """A conversation up to where the assistant's next turn begins."""
        said = [piece for piece, _ in self.script(words, turns)]
        return [*said, self.ids(words, "im_start")["im_start"], "assistant", "\n"]

    def teach(self, words: Words, turns: tuple[Turn, ...], *, answers: Collection[int]) -> Sequence:
        """See `Layout.teach`; an answer ends with the end of its turn."""
        pieces = self.script(words, turns, answers=answers)
        return Sequence(learnt_segments(words, _without_tail(pieces)))

    def script(
        self, words: Words, turns: tuple[Turn, ...], *, answers: Collection[int] = ()
    ) -> list[tuple[Piece, bool]]:
        """A conversation piece by piece, each with whether it is to be learnt.

        answers  numbers of the turns that are, each with its end
        """
        special = self.ids(words, "im_start", "im_end")
        numbered = list(enumerate(turns))
        if turns[0].role != "system":
            numbered.insert(0, (-1, Turn("system", (self.system,))))
        pieces: list[tuple[Piece, bool]] = []
        for number, turn in numbered:
            pieces += [(special["im_start"], False), (turn.role, False), ("\n", False)]
            pieces += [(piece, number in answers) for piece in (*turn.parts, special["im_end"])]
            pieces.append(("\n", False))
        return pieces

    def complete(self, words: Words, text: str, *, length: int) -> Ask:
        """The text after a first token."""
        prompt = text_segment([_first(words), *words.spoken(text)])
        return answering(words, (prompt,), length=length)

    def infill(self, words: Words, text: str, *, picture: Picture | None = None) -> Ask:
        """The text between a first token and its end."""
        assert picture is None, "Dream sees no pictures"
        ids, hole = words.template(text)
        sequence = Sequence(
            (
                text_segment([_first(words)]),
                text_segment(ids, target=hole),
                text_segment([words.vocabulary.eos_id]),
            )
        )
        return Ask(sequence, (sequence,), shown=(1,))

    def ends(self, words: Words) -> tuple[int, ...]:
        """The end of a turn, where the tokenizer has one, and the end of a text."""
        names, _ = self.specials["im_end"]
        end = words.first_of(names)
        return (words.vocabulary.eos_id,) if end is None else (words.vocabulary.eos_id, end)


def _without_tail(pieces: list[tuple[Piece, bool]]) -> list[tuple[Piece, bool]]:
    """The pieces up to the last that is learnt: what opens the next turn is no part of this one."""
    last = max(number for number, (_, learnt) in enumerate(pieces) if learnt)
    return pieces[: last + 1]


def _first(words: Words) -> int:
    """What stands before a text: without it the state that predicts the first word is missing."""
    bos: int | None = words.tokenizer.bos_token_id
    return words.vocabulary.eos_id if bos is None else bos
