"""Lay out prompts of MMaDA: a task token first, LLaDA's headers, images as codes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.core.sequence import Segment, Sequence, text_segment
from mmdlm.templates.infill import shortened
from mmdlm.templates.llada import Llada
from mmdlm.templates.prompt_template import Generation, Sight, Specials
from mmdlm.templates.segments import (
    Piece,
    answering,
    image_segments,
    learned_segments,
    segments_of,
)
from mmdlm.templates.task_prompt import (
    Codes,
    ImageInput,
    TaskPrompt,
    Turn,
    answer_segment,
    without_prompt,
)
from mmdlm.templates.text_codec import TextCodec

CAPTION = "Please describe this image in detail."
THINK = (
    "You should first think about the reasoning process in the mind and then provide the user with "
    "the answer. The reasoning process is enclosed within <think> </think> tags, i.e. <think> "
    "reasoning process here </think> answer here\n"
)
THINK_TO_DRAW = (
    "You should first think out a more detailed version of the description and then provide the "
    "user with the image. The detailed description is enclosed within <think> </think> tags, i.e. "
    "<think> detailed description here </think> image here\n"
)
EOT = "<eot_id>"  # as its training strings have it, which is no token of its tokenizer
TEXT_LENGTH = 512  # of a drawing's prompt with `bos` and `eos`
# The noise of its order decays evenly, as was meant. Its published code multiplies what is left
# from step to step; for results that depend on it set published_defects
# (generation_config.json).
DRAWING = {
    "num_inference_steps": 15,
    "guidance_scale": 4.5,
    "temperature": 1.0,
    "order_temperature": 1.0,
    "reproduce": "mmada",
}


@dataclass(frozen=True)
class Mmada(Llada):
    """Write `<t2i> bos text eos, image` to draw; `<mmu> image, conversation` to understand.

    To think before it draws: `<r2i> conversation eos ..., image`, its text of one length.

    Source: arXiv:2505.15809 and its published code.
    Departures: Its prompts are padded on the left to one length. The padding is not attended to,
    and positions are relative, so that it changes nothing and is left out. Two defects of the
    published code are options, for results that depend on them.

    Attributes:
        attend_pads: The padding is there and is attended to, as it was when the published weights
            were trained.
        literal_eot: Turns end in the letters `<eot_id>`, as in its captions and its reasoning data,
            not in the token that ends a turn.
    """

    attend_pads: bool = False
    literal_eot: bool = False

    family: ClassVar[str] = "mmada"
    sees: ClassVar[Sight] = "codes"
    tasks: ClassVar[tuple[str, ...]] = (
        "caption",
        "answer",
        "chat",
        "text_to_image",
        "draw_trajectory",
        "inpaint",
        "complete",
        "infill",
    )
    # The tokens that it added have taken the places of LLaDA's reserved ones.
    specials: ClassVar[Specials] = {
        **Llada.specials,
        "soi": (("<|soi|>", "<|reserved_token_0|>"), 126084),
        "eoi": (("<|eoi|>", "<|reserved_token_1|>"), 126085),
        "t2i": (("<|t2i|>", "<|reserved_token_4|>"), 126088),
        "mmu": (("<|mmu|>", "<|reserved_token_5|>"), 126089),
        "pad": (("[iPAD]", "<|reserved_token_9|>"), 126093),
        "r2i": (("<|r2i|>", "<|reserved_token_10|>"), 126094),
    }
    generation: ClassVar[Generation] = {
        "text_to_image": DRAWING,
        "inpaint": DRAWING,
        "caption": {"num_inference_steps": 256, "block_length": 128},
        "answer": {"num_inference_steps": 256, "block_length": 128},
        "complete": {"num_inference_steps": 256, "block_length": 128},
        "infill": {"num_inference_steps": 128},
        "fit": "crop",
        "max_text_tokens": 512,
        "max_new_tokens": 512,
    }
    gap: ClassVar[str] = "\n"

    def caption_prompt(self, codec: TextCodec, image: ImageInput, *, length: int) -> TaskPrompt:
        """Ask for a caption as its training data does."""
        return self.chat_prompt(codec, (Turn("user", (image, CAPTION)),), length=length)

    def chat_prompt(self, codec: TextCodec, turns: tuple[Turn, ...], *, length: int) -> TaskPrompt:
        """Ask for the next turn; the image stands before the conversation."""
        images = [part for turn in turns for part in turn.parts if isinstance(part, Codes)]
        spoken = tuple(_without_images(turn) for turn in turns)
        prompt = self._ended(codec, self.prompt(codec, spoken))
        sight = self._sight(codec, images)
        return answering(codec, (*sight, *segments_of(codec, prompt)), length=length)

    def training_sequence(
        self, codec: TextCodec, turns: tuple[Turn, ...], *, answers: Collection[int]
    ) -> Sequence:
        """Lay out words about an image, an image of words, or one after thoughts.

        The last are closed and filled up by the end of text, as the room for them is fixed.
        """
        if drawn := self.drawing(turns):
            prompt, thought, image = drawn
            if not thought:
                return self.image_prompt(codec, prompt, image=image).sequence
            task_prompt = self.thinking_prompt(codec, prompt, grid=image.grid)
            asked, room = (
                task_prompt.sequence.segments[0],
                len(task_prompt.sequence.segments[1].ids),
            )
            ids = codec.encode(thought)
            if len(ids) >= room:
                raise ValueError(
                    f"what is thought before the image, {shortened(thought)!r}, has {len(ids)} "
                    f"tokens, but there is room for {room - 1}; shorten it"
                )
            ids += [codec.vocabulary.eos_id] * (room - len(ids))
            thinking = text_segment(ids, target=True)
            return Sequence((asked, thinking, *self._image(codec, image)))
        images = [part for turn in turns for part in turn.parts if isinstance(part, Codes)]
        spoken = tuple(_without_images(turn) for turn in turns)
        script = self.script(codec, spoken, answers=answers)
        if self.literal_eot:
            eot = self.ids(codec, "eot")["eot"]
            script = [(EOT if piece == eot else piece, learned) for piece, learned in script]
        return Sequence((*self._sight(codec, images), *learned_segments(codec, script)))

    def thinking(self, turns: tuple[Turn, ...], think: bool | None) -> tuple[Turn, ...]:
        """Put the instruction to think before the last question."""
        if not think:
            return turns
        *before, last = turns
        return *before, Turn(last.role, (THINK, *last.parts))

    def image_prompt(
        self, codec: TextCodec, prompt: str, *, image: Codes, negative: str = ""
    ) -> TaskPrompt:
        """Ask for an image; without a prompt the text is there, and empty."""

        def document(text: str) -> Sequence:
            return Sequence((self._drawn(codec, text), *self._image(codec, image)))

        return TaskPrompt(document(prompt), (document(negative),), output_segments=(2,))

    def thinking_prompt(
        self, codec: TextCodec, prompt: str, *, grid: tuple[int, int]
    ) -> TaskPrompt:
        """Ask for the description; it is written before the image, in one document."""
        asked = self._ended(codec, self.prompt(codec, (Turn("user", (THINK_TO_DRAW, prompt)),)))
        (text,) = segments_of(codec, [self.ids(codec, "r2i")["r2i"], *asked])
        room = TEXT_LENGTH + 1 - len(text.ids)
        if room < 1:
            raise ValueError(
                f"prompt {shortened(prompt)!r} leaves no room to think in the {TEXT_LENGTH} tokens "
                "of this model; shorten it"
            )
        sequence = Sequence(
            (
                text,
                answer_segment(codec, room),
                *self._image(codec, Codes.blank(codec, grid)),
            )
        )
        return TaskPrompt(sequence, (without_prompt(sequence, codec),), output_segments=(1,))

    def image_prompt_after_thinking(
        self, codec: TextCodec, reasoned: Sequence, *, image: Codes
    ) -> TaskPrompt:
        """Ask for the image; the other branch masks all that was asked and thought."""
        prompt, thought = reasoned.segments[:2]
        known = text_segment(torch.cat([prompt.ids, thought.ids]))
        task, rest = known.ids[:1], known.ids[1:]
        nothing = text_segment(torch.cat([task, codec.masks(len(rest))]))
        output_segments = self._image(codec, image)
        return TaskPrompt(
            Sequence((known, *output_segments)),
            (Sequence((nothing, *output_segments)),),
            output_segments=(2,),
        )

    def completion_prompt(self, codec: TextCodec, text: str, *, length: int) -> TaskPrompt:
        """Ask for what follows a text, which begins with `bos`."""
        bos = self.ids(codec, "bos")["bos"]
        return answering(codec, (text_segment([bos, *codec.encode(text)]),), length=length)

    def infill_prompt(
        self, codec: TextCodec, text: str, *, image: ImageInput | None = None
    ) -> TaskPrompt:
        """Fill in `bos text eos`, behind the image that it describes."""
        assert image is None or isinstance(image, Codes)
        ids, hole = codec.parse_infill_template(text)
        written = (
            text_segment([self.ids(codec, "bos")["bos"]]),
            text_segment(ids, target=hole),
            text_segment([codec.vocabulary.eos_id]),
        )
        sight = self._sight(codec, [] if image is None else [image])
        nothing = () if image is None else self._sight(codec, [Codes.blank(codec, image.grid)])
        return TaskPrompt(
            Sequence((*sight, *written)),
            (Sequence((*nothing, *written)),),
            output_segments=(len(sight) + 1,),
        )

    def decode(self, codec: TextCodec, ids: Tensor) -> str:
        """Decode generated ids [T]; the letters `<eot_id>` end a text too."""
        return super().decode(codec, ids).split(EOT)[0]

    def _ended(self, codec: TextCodec, prompt: list[Piece]) -> list[Piece]:
        """Return the conversation with its turns ended as `literal_eot` says."""
        eot = self.ids(codec, "eot")["eot"]
        return [EOT if piece == eot else piece for piece in prompt] if self.literal_eot else prompt

    def _sight(self, codec: TextCodec, images: list[Codes]) -> tuple[Segment, ...]:
        """Return `<mmu>` and the image; nothing if there is none."""
        if not images:
            return ()
        if len(images) > 1:
            raise ValueError(
                f"this model (mmada) looks at one image in a conversation, not {len(images)}; "
                "ask about each of them"
            )
        mmu = text_segment([self.ids(codec, "mmu")["mmu"]])
        return mmu, *self._image(codec, images[0])

    def _image(self, codec: TextCodec, image: Codes) -> tuple[Segment, ...]:
        """Return `<soi> codes <eoi>`."""
        special = self.ids(codec, "soi", "eoi")
        return image_segments(codec, image, markers=(special["soi"], special["eoi"]))

    def _drawn(self, codec: TextCodec, text: str) -> Segment:
        """Return `<t2i> bos text eos`."""
        special = self.ids(codec, "t2i", "bos")
        ids = [special["t2i"], special["bos"], *codec.encode(text), codec.vocabulary.eos_id]
        if len(ids) > TEXT_LENGTH + 1:
            raise ValueError(
                f"prompt {shortened(text)!r} has {len(ids) - 3} tokens, but this model was trained "
                f"on at most {TEXT_LENGTH - 2}; shorten it"
            )
        if self.attend_pads:
            ids = [self.ids(codec, "pad")["pad"]] * (TEXT_LENGTH + 1 - len(ids)) + ids
        return text_segment(ids)


def _without_images(turn: Turn) -> Turn:
    text = "".join(part for part in turn.parts if isinstance(part, str)).strip()
    return Turn(turn.role, (text,))
