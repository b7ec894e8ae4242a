"""Lay out prompts of Lumina-DiMOO: tags around what is said, a line end after each row of codes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from mmdlm.core.sequence import Segment, Sequence, control_segment, text_segment
from mmdlm.core.vocabulary import Modality
from mmdlm.templates.prompt_template import Generation, PromptTemplate, Sight, Specials
from mmdlm.templates.task_prompt import (
    Codes,
    ImageInput,
    TaskPrompt,
    Turn,
    answer_segment,
    without_prompt,
)
from mmdlm.templates.text_codec import TextCodec

CAPTION = "Please describe this image."
UNDERSTAND = (
    "You are a multimodal model that can process both text and images. Answer the following "
    "question based on the provided images. Analyze each image and combine relevant details to "
    "answer."
)
DRAW = "Generate an image according to the text prompt."
# What an edit may be, each with the system prompt that it was trained under. Some instructions are
# published: "dense" `Generate a canny edge map according to the image.` (or hed edge map, normal
# map, sam2 mask, depth map, pose estimation map); "multi_view" `Generate the left view based on the
# provided front view.`; "style" its system prompt again, the image with the style being the last.
EDITS: Mapping[str, str] = {
    "edit": "Generate an image applying the following editing instruction based on the original "
    "image.",
    "dense": "Perform dense prediction on the given images.",
    "control": "Generate an image according to the text prompt and the given control image.",
    "subject": "Generate an image according to the text prompt and the given object image.",
    "multi_view": "Generate a view-image based on the given image.",
    "style": "Transform the current image into the style of the provided image.",
}
NO_WORDS = "<uncondition>"
MAX_RATIO = 4.0  # of the sides of an image
# Noise of its order stays to the last step, as in its published code.
DRAWING = {
    "num_inference_steps": 64,
    "temperature": 1.0,
    "order_temperature": 1.0,
    "order_decay": "none",
    "reproduce": "lumina",
}


@dataclass(frozen=True)
class Lumina(PromptTemplate):
    """Write `<system> ... </system><user> ... [images] </user><answer> ... </answer>`.

    Source: arXiv:2510.06308 and its published code.
    Departures: Images are cut in the middle to the allowed shape that keeps most of them; the
    published code cuts at random.

    Attributes:
        editing: The task of `edit`, one of `EDITS`.
        side: Edge in pixels of the square that has the area of an image, drawn or looked at.
        edit_side: The same of an image that is edited.
        step: Sides of images that are looked at are multiples of it, in pixels.
    """

    editing: str = "edit"
    side: int = 1024
    edit_side: int = 512
    step: int = 32

    family: ClassVar[str] = "lumina"
    # Its config.json has LLaDA's 4096, which an image of 1024 x 1024 alone exceeds.
    longest: ClassVar[int] = 8192
    sees: ClassVar[Sight] = "codes"
    square: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = (
        "caption",
        "answer",
        "text_to_image",
        "draw_trajectory",
        "inpaint",
        "edit",
    )
    specials: ClassVar[Specials] = {
        "newline": (("<|reserved_token_0|>",), 126084),
        "answer": (("<answer>",), 126354),
        "end_answer": (("</answer>",), 126355),
    }
    generation: ClassVar[Generation] = {
        "text_to_image": {**DRAWING, "guidance_scale": 5.0},
        "inpaint": {**DRAWING, "guidance_scale": 5.0},
        "edit": {**DRAWING, "guidance_scale": (3.5, 5.0)},
        "caption": {"num_inference_steps": 128, "block_length": 32},
        "answer": {"num_inference_steps": 128, "block_length": 256},
        "fit": "crop",
        "max_text_tokens": 128,
        "max_new_tokens": 1024,
    }

    def __post_init__(self) -> None:
        """Check the task of `edit`."""
        if self.editing not in EDITS:
            raise ValueError(f"editing {self.editing!r} is not one of {', '.join(EDITS)}")

    def caption_prompt(self, codec: TextCodec, image: ImageInput, *, length: int) -> TaskPrompt:
        """Ask for a caption in a conversation."""
        return self.chat_prompt(codec, (Turn("user", (image, CAPTION)),), length=length)

    def chat_prompt(self, codec: TextCodec, turns: tuple[Turn, ...], *, length: int) -> TaskPrompt:
        """Ask one question; its images stand before the last token of the prompt."""
        (question,) = turns
        images = [part for part in question.parts if isinstance(part, Codes)]
        text = "".join(part for part in question.parts if isinstance(part, str)).strip()
        special = self.ids(codec, "answer", "end_answer")
        sequence = Sequence(
            (
                *self._prompt(codec, UNDERSTAND, text, images),
                control_segment(special["answer"]),
                answer_segment(codec, length),
                control_segment(special["end_answer"]),
            )
        )
        output_segments = len(sequence.segments) - 2
        return TaskPrompt(
            sequence, (without_prompt(sequence, codec),), output_segments=(output_segments,)
        )

    def image_prompt(
        self, codec: TextCodec, prompt: str, *, image: Codes, negative: str = ""
    ) -> TaskPrompt:
        """Ask for an image; the other branch says `<uncondition>`, or what to stay away from."""
        with_words, without = (
            self._prompt(codec, DRAW, text or None, []) for text in (prompt, negative)
        )
        return self._drawn(codec, image, with_words, without)

    def edit_prompt(
        self, codec: TextCodec, instruction: str, *, sources: tuple[Codes, ...], image: Codes
    ) -> TaskPrompt:
        """Ask for an edited image; one branch lacks the words, the other the images."""
        system, given = EDITS[self.editing], list(sources)
        return self._drawn(
            codec,
            image,
            self._prompt(codec, system, instruction, given),
            self._prompt(codec, system, None, given),
            self._prompt(codec, system, instruction, []),
        )

    def training_sequence(
        self, codec: TextCodec, turns: tuple[Turn, ...], *, answers: Collection[int]
    ) -> Sequence:
        """Lay out one question and its answer to learn from."""
        if len(turns) != 2:
            raise ValueError(
                "this model (lumina) learns one question with its answer, not "
                f"{len(turns)} messages"
            )
        return super().training_sequence(codec, turns, answers=answers)

    def closing(self, codec: TextCodec) -> tuple[int, ...]:
        """Return the end of an answer."""
        return (self.ids(codec, "end_answer")["end_answer"],)

    def stop_ids(self, codec: TextCodec) -> tuple[int, ...]:
        """Return the end of an answer, and that of a text."""
        return self.ids(codec, "end_answer")["end_answer"], codec.vocabulary.eos_id

    def canvas(self, size: tuple[int, int], *, edge: int, task: str) -> tuple[int, int]:
        """Return the shape, of all that have the area, into which the image fits best."""
        side = self.edit_side if task == "edit" else self.side
        return best_crop(size, crops((side // self.step) ** 2, self.step))

    def drawn_size(
        self, size: tuple[int | None, int | None], *, edge: int, cell: int
    ) -> tuple[int, int]:
        """Accept any size of whole codes."""
        height, width = (self.side if side is None else side for side in size)
        for name, side in (("height", height), ("width", width)):
            if isinstance(side, bool) or not isinstance(side, int) or side < cell or side % cell:
                raise ValueError(
                    f"{name} {side!r} is not a multiple of {cell} pixels; take for example "
                    f"{max(cell, round(side / cell) * cell)}"
                )
        return height, width

    def _prompt(
        self, codec: TextCodec, system: str, text: str | None, images: list[Codes]
    ) -> tuple[Segment, ...]:
        """Tokenize a prompt as a whole, as not all tags are tokens; put the images into its end.

        Args:
            codec: The text tokenizer.
            system: What the model is told first.
            text: Names of special tokens in it are letters; None: no words at all.
            images: Of the prompt.
        """
        before, after = f"<system>{system}</system><user>", "</user>"
        ids = codec.encode_with_specials(before + (NO_WORDS if text is None else text) + after)
        if text is not None and codec.encode_with_specials(text) != codec.encode(
            text
        ):  # it names special tokens
            ids = [
                *codec.encode_with_specials(before),
                *codec.encode(text),
                *codec.encode_with_specials(after),
            ]
        if not images:
            return (text_segment(ids),)
        output_segments = [segment for one in images for segment in self._image(codec, one)]
        return text_segment(ids[:-1]), *output_segments, text_segment(ids[-1:])

    def _image(self, codec: TextCodec, image: Codes) -> tuple[Segment, ...]:
        """Return `begin image`, each row with a line end after it, `end image`."""
        begin, end = map(control_segment, codec.vocabulary.image_markers)
        newline = control_segment(self.ids(codec, "newline")["newline"])
        columns = image.grid[1]
        rows = [
            segment
            for ids, open_ in zip(image.ids.split(columns), image.open.split(columns), strict=True)
            for segment in (Segment(Modality.IMAGE, ids, open_), newline)
        ]
        return begin, *rows, end

    def _drawn(
        self,
        codec: TextCodec,
        image: Codes,
        prompt: tuple[Segment, ...],
        *others: tuple[Segment, ...],
    ) -> TaskPrompt:
        """Lay out a prompt with an image for its answer, and the same image after other prompts."""
        special = self.ids(codec, "answer", "end_answer")
        answer = (
            control_segment(special["answer"]),
            *self._image(codec, image),
            control_segment(special["end_answer"]),
        )
        first = len(prompt) + 2  # the first row
        return TaskPrompt(
            Sequence((*prompt, *answer)),
            tuple(Sequence((*other, *answer)) for other in others),
            output_segments=tuple(range(first, first + 2 * image.grid[0], 2)),
        )


def crops(count: int, step: int, *, max_ratio: float = MAX_RATIO) -> list[tuple[int, int]]:
    """List the shapes (width, height) of images of at most `count` patches, widest first.

    Args:
        count: Most patches.
        step: Edge of a patch in pixels.
        max_ratio: Most times that an image is as long as it is wide.

    Returns:
        For each width the highest.
    """
    shapes = []
    for width in range(count, 0, -1):
        # Starting from the height that the width before it had, as many as fit.
        least = count // (width + 1) if width < count else 1
        for height in range(max(1, least), count // width + 1):
            if max(width, height) <= max_ratio * min(width, height):
                shapes.append((width * step, height * step))
    return shapes


def best_crop(size: tuple[int, int], shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the shape (height, width) that keeps most of an image of size (width, height)."""

    def kept(shape: tuple[int, int]) -> float:
        across, down = shape[0] / size[0], shape[1] / size[1]
        return min(across, down) / max(across, down)

    width, height = max(shapes, key=lambda shape: (kept(shape), shape))
    return height, width
