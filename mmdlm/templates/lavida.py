"""Lay out prompts of LaViDa: LLaDA's or Dream's conversation, images in five views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdlm.core.sequence import Sequence, text_segment
from mmdlm.templates.dream import Dream
from mmdlm.templates.llada import Llada
from mmdlm.templates.llada_v import SYSTEM
from mmdlm.templates.prompt_template import Generation, Sight, Specials
from mmdlm.templates.segments import Piece, segments_of
from mmdlm.templates.task_prompt import ImageInput, TaskPrompt, Turn, without_prompt
from mmdlm.templates.text_codec import TextCodec

CAPTION = "Describe the image in detail."
TASKS = ("caption", "answer", "chat", "complete", "infill")
# Half as many steps as tokens, more of them unmasked at first. Source: arXiv:2505.16839, section
# 3.4. That its prompt may attend only to itself is a cache, and does not change the layout.
DECODING = {"num_inference_steps": 64, "schedule": "shifted", "shift": 1 / 3}
GENERATION = {
    "caption": DECODING,
    "answer": DECODING,
    "complete": DECODING,
    "infill": {"num_inference_steps": 128},
    "max_text_tokens": 128,
    "max_new_tokens": 128,
}


@dataclass(frozen=True)
class LavidaLlada(Llada):
    """LaViDa on LLaDA.

    Attributes:
        flexible: Each hole of a text to fill in is followed by [FIM], before which the model may
            leave tokens over as [S]; for the checkpoint that was trained to (its name ends in
            -fim).
    """

    flexible: bool = False

    family: ClassVar[str] = "lavida_llada"
    sees: ClassVar[Sight] = "features"
    tasks: ClassVar[tuple[str, ...]] = TASKS
    specials: ClassVar[Specials] = {
        **Llada.specials,
        "fim": (("[FIM]", "<|reserved_token_1|>"), 126085),
        "s": (("[S]", "<|reserved_token_2|>"), 126086),
    }
    generation: ClassVar[Generation] = GENERATION
    system: ClassVar[str | None] = SYSTEM

    def caption_prompt(self, codec: TextCodec, image: ImageInput, *, length: int) -> TaskPrompt:
        """Ask for a caption in a conversation."""
        return self.chat_prompt(codec, (_asked(image),), length=length)

    def infill_prompt(
        self, codec: TextCodec, text: str, *, image: ImageInput | None = None
    ) -> TaskPrompt:
        """Fill in a text; with an image it is the assistant's description of it."""
        if image is None and not self.flexible:
            return super().infill_prompt(codec, text)
        ids, hole = codec.parse_infill_template(text)
        if self.flexible:
            ids, hole = _followed(ids, hole, self.ids(codec, "fim")["fim"])
        prompt = () if image is None else (_asked(image),)
        pieces = self.prompt(codec, prompt) if prompt else []
        return _filled(codec, pieces, ids, hole, end=self.ids(codec, "eot")["eot"])

    def decode(self, codec: TextCodec, ids: Tensor) -> str:
        """Decode without [FIM] and [S], if holes may be filled in part."""
        if self.flexible:
            left = torch.tensor(list(self.ids(codec, "fim", "s").values()))
            ids = ids[~torch.isin(ids, left)]
        return super().decode(codec, ids)


class LavidaDream(Dream):
    """LaViDa on Dream, whose answers are written in the order of its published benchmarks."""

    family: ClassVar[str] = "lavida_dream"
    sees: ClassVar[Sight] = "features"
    tasks: ClassVar[tuple[str, ...]] = TASKS
    generation: ClassVar[Generation] = {
        **GENERATION,
        "caption": {**DECODING, "order": "margin"},
        "answer": {**DECODING, "order": "margin"},
    }
    system: ClassVar[str] = SYSTEM

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
        pieces = self.prompt(codec, (_asked(image),))
        return _filled(codec, pieces, ids, hole, end=self.ids(codec, "im_end")["im_end"])


def _asked(image: ImageInput) -> Turn:
    return Turn("user", (image, "\n" + CAPTION))


def _filled(
    codec: TextCodec, prompt: list[Piece], ids: Tensor, hole: Tensor, *, end: int
) -> TaskPrompt:
    before = segments_of(codec, prompt)
    sequence = Sequence((*before, text_segment(ids, target=hole), text_segment([end])))
    return TaskPrompt(sequence, (without_prompt(sequence, codec),), output_segments=(len(before),))


def _followed(ids: Tensor, hole: Tensor, mark: int) -> tuple[Tensor, Tensor]:
    """Put a mark after each hole of a text [T]."""
    last = hole & ~torch.cat([hole[1:], torch.zeros(1, dtype=torch.bool)])
    places = torch.arange(len(ids)) + last.cumsum(0) - last.int()
    marked = torch.full((len(ids) + int(last.sum()),), mark)
    open_ = torch.zeros(marked.shape, dtype=torch.bool)
    marked[places], open_[places] = ids, hole
    return marked, open_
