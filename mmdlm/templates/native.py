"""Lay out prompts of models trained here: begin image, codes, end image, text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmdlm.core.sequence import Segment, Sequence, control_segment, text_segment
from mmdlm.core.vocabulary import Modality
from mmdlm.templates.chat_template import PLAIN, ChatTemplate, end_of_turn
from mmdlm.templates.prompt_template import Generation, PromptTemplate, Sight, Tool
from mmdlm.templates.segments import answering, learned_segments, segments_of
from mmdlm.templates.task_prompt import Codes, ImageInput, TaskPrompt, Turn, answer_segment
from mmdlm.templates.text_codec import TextCodec

# A text grows from its beginning. Most texts do not fill their canvas, so that its end is likely at
# every place: by confidence ends would be committed first, and leave nothing to say.
WRITING = {"order": "left_to_right", "min_new_tokens": 1}

# Of a record of tasks, beside methods of `mmdlm.pipeline.model.Model`: conversations about images.
ABOUT_IMAGES = "answer_about_images"
DESCRIBE = "Describe the image."


@dataclass(frozen=True)
class Native(PromptTemplate):
    """Lay out all tasks alike: a task is only the choice of which tokens are targets.

    What is not known (the image of a text to be filled in, the words of an image to be repainted)
    stands there as mask tokens.

    Attributes:
        trained: Tasks that the model was trained for, as its checkpoint records them: methods of
            `mmdlm.pipeline.model.Model`, and `ABOUT_IMAGES`; None: nothing is recorded, and all
            tasks of the template are taken for trained, those of conversations if the text
            tokenizer has a chat template.
    """

    trained: tuple[str, ...] | None = None

    family: ClassVar[str] = "mmdlm"
    sees: ClassVar[Sight] = "codes"
    tasks: ClassVar[tuple[str, ...]] = (
        "caption",
        "text_to_image",
        "draw_trajectory",
        "inpaint",
        "infill",
        "complete",
    )
    recorded: ClassVar[Generation] = {
        "caption": {"num_inference_steps": 64, **WRITING},
        "answer": {"num_inference_steps": 128, **WRITING},
        "complete": {"num_inference_steps": 128, **WRITING},
    }
    chat_template: ClassVar[str | None] = PLAIN
    spoken_tasks: ClassVar[tuple[str, ...]] = ("answer", "chat", "edit")  # of conversations

    def tasks_with(self, tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
        """Return the tasks that the model was trained for.

        Those of conversations need a chat template. A model that learned to talk about images, but
        not to caption them, captions when it is asked to.
        """
        spoken = () if tokenizer.chat_template is None else self.spoken_tasks
        if self.trained is None:
            return (*self.tasks, *spoken)
        known = {*self.trained}
        if "text_to_image" in known:
            known.add("draw_trajectory")
        if spoken and ABOUT_IMAGES in known:
            known.add("caption")
        return tuple(task for task in (*self.tasks, *spoken) if task in known)

    def require(self, task: str, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raise ValueError unless the model has the task; say how a model learns to talk."""
        if task in self.spoken_tasks:
            self._need_template(task, tokenizer)
        tasks = self.tasks_with(tokenizer)
        if not tasks:
            raise ValueError(f"this model ({self.family}) was not trained yet, and not for {task}")
        if task not in tasks:
            self.unsupported(task, tasks)

    def _need_template(self, task: str, tokenizer: PreTrainedTokenizerFast) -> None:
        if tokenizer.chat_template is None:
            self.unsupported(
                task,
                self.tasks_with(tokenizer),
                hint="; its text tokenizer has no chat template, which train.sft on conversations "
                "gives it",
            )

    @property
    def captions(self) -> bool:
        """Whether the model learned captions without words that ask for them."""
        return self.trained is None or "caption" in self.trained

    def caption_prompt(self, codec: TextCodec, image: ImageInput, *, length: int) -> TaskPrompt:
        """Leave the text open, in the other branch without the image.

        A model that learned to describe images only in conversations is asked in one.
        """
        if not self.captions:
            return self.chat_prompt(codec, (Turn("user", (image, DESCRIBE)),), length=length)
        assert isinstance(image, Codes)
        text, everything = codec.masks(length), torch.ones(length, dtype=torch.bool)
        return _ask(
            _document(codec, image, text, write=everything),
            _document(codec, Codes.blank(codec, image.grid), text, write=everything),
        )

    def image_prompt(
        self, codec: TextCodec, prompt: str, *, image: Codes, negative: str = ""
    ) -> TaskPrompt:
        """Take the text as context; the rest of the image stays in both branches."""
        text = codec.append_eos(codec.prompt(prompt))
        nothing = torch.full_like(text, codec.vocabulary.mask_id)
        against = codec.append_eos(codec.prompt(negative)) if negative.strip() else nothing
        document = _document(codec, image, text if prompt.strip() else nothing)
        return TaskPrompt(document, (_document(codec, image, against),), output_segments=(1,))

    def edit_prompt(
        self, codec: TextCodec, instruction: str, *, sources: tuple[Codes, ...], image: Codes
    ) -> TaskPrompt:
        """Lay out `images, instruction, end of text, image to be drawn`.

        The first branch beside it lacks the instruction, the second the images: mask tokens stand
        in their places.
        """
        text = torch.tensor(
            [*codec.checked(codec.encode(instruction), instruction), codec.vocabulary.eos_id]
        )
        nothing = torch.full_like(text, codec.vocabulary.mask_id)
        unknown = tuple(Codes.blank(codec, source.grid) for source in sources)
        whole, *others = (
            Sequence(
                (
                    *(segment for source in some for segment in _beside(codec, source)),
                    text_segment(said),
                    *_beside(codec, image),
                )
            )
            for some, said in ((sources, text), (sources, nothing), (unknown, text))
        )
        return TaskPrompt(whole, tuple(others), output_segments=(len(whole.segments) - 2,))

    def infill_prompt(
        self, codec: TextCodec, text: str, *, image: ImageInput | None = None
    ) -> TaskPrompt:
        """Leave the holes open, in the other branch without the image."""
        assert image is None or isinstance(image, Codes)
        ids, hole = codec.parse_infill_template(text)
        return _write(codec, codec.append_eos(ids), hole, image)

    def completion_prompt(self, codec: TextCodec, text: str, *, length: int) -> TaskPrompt:
        """Leave open what follows the text, up to the end of the slots if there are slots."""
        ids = codec.prompt(text)
        length = min(length, (codec.slots or codec.longest + 1) - len(ids))
        rest = 0 if codec.slots is None else codec.slots - len(ids) - length
        segments = (
            *_beside(codec, _nothing(codec)),
            text_segment(ids),
            answer_segment(codec, length),
            text_segment([codec.vocabulary.eos_id] * rest),
        )
        return TaskPrompt(
            Sequence(segments), (Sequence(segments),), output_segments=(len(segments) - 2,)
        )

    def chat_prompt(self, codec: TextCodec, turns: tuple[Turn, ...], *, length: int) -> TaskPrompt:
        """Use the tokenizer's chat template; images stand where they are spoken of."""
        prompt = self._template(codec, turns).prompt()
        return answering(codec, segments_of(codec, prompt), length=length)

    def tool_prompt(
        self, codec: TextCodec, turns: tuple[Turn, ...], *, tools: tuple[Tool, ...], length: int
    ) -> TaskPrompt:
        """Use the tokenizer's chat template, which writes the tools where it has them."""
        self._need_template("chat", codec.tokenizer)
        prompt = ChatTemplate.of(codec, turns, tools=tools).prompt()
        return answering(codec, segments_of(codec, prompt), length=length)

    def training_sequence(
        self, codec: TextCodec, turns: tuple[Turn, ...], *, answers: Collection[int]
    ) -> Sequence:
        """Lay out a conversation to learn from.

        An answer ends with the special token that ends it in the chat template. An answer that is
        an image is learned as `edit` or `text_to_image` ask for it.
        """
        if edited := self.image_edit(turns):
            instruction, sources, image = edited
            return self.edit_prompt(codec, instruction, sources=sources, image=image).sequence
        if any(not isinstance(part, str) for part in turns[-1].parts):
            return self.untemplated_sequence(codec, turns)
        script = self._template(codec, turns).script(answers)
        return Sequence(learned_segments(codec, script))

    def _template(self, codec: TextCodec, turns: tuple[Turn, ...]) -> ChatTemplate:
        self._need_template("chat", codec.tokenizer)
        return ChatTemplate.of(codec, tuple(map(_tight, turns)))

    def completion_sequence(self, codec: TextCodec, beginning: str, rest: str) -> Sequence:
        """Lay out a text to be learned from its beginning; ends that fill the slots are learned."""
        ids = [*codec.encode(rest), codec.vocabulary.eos_id]
        sequence = self.completion_prompt(codec, beginning, length=len(ids)).sequence
        *before, answer, tail = sequence.segments
        if len(answer.ids) < len(ids):
            raise ValueError(f"{len(ids)} tokens of an answer are too many for this model")
        return Sequence((*before, text_segment([*ids, *tail.ids.tolist()], target=True)))

    def stop_ids(self, codec: TextCodec) -> tuple[int, ...]:
        """Return the end of a text, and what ends an answer in the chat template."""
        end = end_of_turn(codec)
        return tuple(dict.fromkeys((codec.vocabulary.eos_id, *(() if end is None else (end,)))))

    def completion(self, codec: TextCodec, text: str, ids: Tensor) -> str:
        """Decode what follows a text; the model saw the text without a space at its end."""
        said = self.continued(codec, ids)
        return said.removeprefix(" ") if text[-1:].isspace() else said

    def decode(self, codec: TextCodec, ids: Tensor) -> str:
        """Decode generated ids [T]; special tokens that a text names are part of it."""
        return str(codec.tokenizer.decode(self.written(codec, ids).tolist()))


def _tight(turn: Turn) -> Turn:
    """Drop the blanks around images: a question is the same tokens however it names its image."""
    if all(isinstance(part, str) for part in turn.parts):
        return turn
    parts = (part.strip() if isinstance(part, str) else part for part in turn.parts)
    return replace(turn, parts=tuple(part for part in parts if part != ""))


def _write(codec: TextCodec, text: Tensor, hole: Tensor, image: Codes | None) -> TaskPrompt:
    """Lay out a text whose beginning [n] has holes, below an image."""
    write = torch.zeros(text.shape, dtype=torch.bool)
    write[: len(hole)] = hole
    nothing = _nothing(codec) if image is None else Codes.blank(codec, image.grid)
    return _ask(
        _document(codec, image or nothing, text, write=write),
        _document(codec, nothing, text, write=write),
    )


def _nothing(codec: TextCodec) -> Codes | None:
    """Return the image beside a text: a model of fixed slots has always seen one."""
    if codec.grid is None or codec.slots is None:
        return None
    return Codes.blank(codec, codec.grid)


def _ask(document: Sequence, unconditional: Sequence) -> TaskPrompt:
    """Take the text as the result: it is the last segment."""
    return TaskPrompt(document, (unconditional,), output_segments=(len(document.segments) - 1,))


def _document(
    codec: TextCodec, image: Codes | None, text: Tensor, *, write: Tensor | None = None
) -> Sequence:
    """Return `begin image, codes [K], end image, text [T]`, all of them ids.

    Args:
        codec: The text tokenizer.
        image: None: there is no image.
        text: [T] ids.
        write: [T] bool, which tokens of the text are targets; None: none.
    """
    context = torch.zeros(text.shape, dtype=torch.bool)
    written = Segment(Modality.TEXT, text, context if write is None else write)
    return Sequence((*_beside(codec, image), written))


def _beside(codec: TextCodec, image: Codes | None) -> tuple[Segment, ...]:
    if image is None:
        return ()
    begin, end = map(control_segment, codec.vocabulary.image_markers)
    return begin, Segment(Modality.IMAGE, image.ids, image.open), end
