"""The layout of models trained here: begin image, codes, end image, text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmdlm.core.sequence import Segment, Sequence, control_segment, text_segment
from mmdlm.core.vocabulary import Modality
from mmdlm.templates.chat_template import PLAIN, ChatTemplate, end_of_turn
from mmdlm.templates.prompt_template import (
    Ask,
    Codes,
    Generation,
    Layout,
    Picture,
    Sight,
    Turn,
    answer_segment,
)
from mmdlm.templates.segments import answering, learnt_segments, segments_of
from mmdlm.templates.text_codec import Words

# A text grows from its beginning. Most texts do not fill their canvas, so that its end is likely at
# every place: by confidence ends would be committed first, and leave nothing to say.
WRITING = {"order": "left_to_right", "min_new_tokens": 1}

# Of a record of tasks, beside methods of `mmdlm.pipeline.model.Model`: conversations about images.
ABOUT_IMAGES = "answer_about_images"
DESCRIBE = "Describe the image."


@dataclass(frozen=True)
class Own(Layout):
    """One layout for all tasks: a task is only the choice of which of its tokens are targets.

    What is not known (the picture of a text to be filled in, the words of a picture to be mended)
    stands there as mask tokens.

    trained  tasks that the model was trained for, as its checkpoint records them: methods of
             `mmdlm.pipeline.model.Model`, and `ABOUT_IMAGES`; None: nothing is recorded, and all
             tasks
             are taken for trained that the layout has, those of conversations where the text
             tokenizer has a chat template
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
    spoken_tasks: ClassVar[tuple[str, ...]] = (
        "answer",
        "chat",
        "edit",
    )  # learned from conversations

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

    def need(self, task: str, tokenizer: PreTrainedTokenizerFast) -> None:
        """See `Layout.need`; say how a model learns to talk."""
        if task in self.spoken_tasks:
            self._need_template(task, tokenizer)
        if not self.tasks_with(tokenizer):
            raise ValueError(f"this model ({self.family}) was not trained yet, and not for {task}")
        super().need(task, tokenizer)

    def _need_template(self, task: str, tokenizer: PreTrainedTokenizerFast) -> None:
        if tokenizer.chat_template is None:
            self.cannot(
                task,
                self.tasks_with(tokenizer),
                hint="; its text tokenizer has no chat template, which train.sft on conversations "
                "gives it",
            )

    @property
    def captions(self) -> bool:
        """Return whether the model learned captions without words that ask for them."""
        return self.trained is None or "caption" in self.trained

    def describe(self, words: Words, picture: Picture, *, length: int) -> Ask:
        """The text is open; without the picture it is open too, in the other branch.

        A model that learned to describe images in conversations alone is asked in one.
        """
        if not self.captions:
            return self.reply(words, (Turn("user", (picture, DESCRIBE)),), length=length)
        assert isinstance(picture, Codes)
        text, everything = words.masks(length), torch.ones(length, dtype=torch.bool)
        return _ask(
            _document(words, picture, text, write=everything),
            _document(words, Codes.blank(words, picture.grid), text, write=everything),
        )

    def draw(self, words: Words, prompt: str, *, picture: Codes, negative: str = "") -> Ask:
        """The text is context; the rest of the picture stays in both branches."""
        text = words.closed(words.prompt(prompt))
        nothing = torch.full_like(text, words.vocabulary.mask_id)
        against = words.closed(words.prompt(negative)) if negative.strip() else nothing
        document = _document(words, picture, text if prompt.strip() else nothing)
        return Ask(document, (_document(words, picture, against),), shown=(1,))

    def edit(
        self, words: Words, instruction: str, *, sources: tuple[Codes, ...], picture: Codes
    ) -> Ask:
        """Lay out `images, instruction, end of text, image to be drawn`.

        The first branch beside it lacks the instruction, the second the images: mask tokens stand
        in their places.
        """
        text = torch.tensor(
            [*words.checked(words.spoken(instruction), instruction), words.vocabulary.eos_id]
        )
        nothing = torch.full_like(text, words.vocabulary.mask_id)
        unknown = tuple(Codes.blank(words, source.grid) for source in sources)
        whole, *others = (
            Sequence(
                (
                    *(segment for image in images for segment in _beside(words, image)),
                    text_segment(said),
                    *_beside(words, picture),
                )
            )
            for images, said in ((sources, text), (sources, nothing), (unknown, text))
        )
        return Ask(whole, tuple(others), shown=(len(whole.segments) - 2,))

    def infill(self, words: Words, text: str, *, picture: Picture | None = None) -> Ask:
        """The holes are open; without the picture they are open too, in the other branch."""
        assert picture is None or isinstance(picture, Codes)
        ids, hole = words.template(text)
        return _write(words, words.closed(ids), hole, picture)

    def complete(self, words: Words, text: str, *, length: int) -> Ask:
        """What follows the text is open, to the end of the slots where there are slots."""
        ids = words.prompt(text)
        length = min(length, (words.slots or words.longest + 1) - len(ids))
        rest = 0 if words.slots is None else words.slots - len(ids) - length
        segments = (
            *_beside(words, _nothing(words)),
            text_segment(ids),
            answer_segment(words, length),
            text_segment([words.vocabulary.eos_id] * rest),
        )
        return Ask(Sequence(segments), (Sequence(segments),), shown=(len(segments) - 2,))

    def reply(self, words: Words, turns: tuple[Turn, ...], *, length: int) -> Ask:
        """By the tokenizer's chat template; images stand where they are spoken of."""
        prompt = self._template(words, turns).prompt()
        return answering(words, segments_of(words, prompt), length=length)

    def teach(self, words: Words, turns: tuple[Turn, ...], *, answers: Collection[int]) -> Sequence:
        """See `Layout.teach`; an answer ends with the special token that ends it in the template.

        An answer that is an image is learned as `edit` or `draw` ask for it.
        """
        if edited := self.image_edit(turns):
            instruction, sources, image = edited
            return self.edit(words, instruction, sources=sources, picture=image).sequence
        if any(not isinstance(part, str) for part in turns[-1].parts):
            return self.teach_task(words, turns)
        script = self._template(words, turns).script(answers)
        return Sequence(learnt_segments(words, script))

    def _template(self, words: Words, turns: tuple[Turn, ...]) -> ChatTemplate:
        self._need_template("chat", words.tokenizer)
        return ChatTemplate.of(words, turns)

    def teach_completion(self, words: Words, beginning: str, rest: str) -> Sequence:
        """See `Layout.teach_completion`; ends that fill the slots, if any, are learned too."""
        ids = [*words.spoken(rest), words.vocabulary.eos_id]
        sequence = self.complete(words, beginning, length=len(ids)).sequence
        *before, answer, tail = sequence.segments
        if len(answer.ids) < len(ids):
            raise ValueError(f"{len(ids)} tokens of an answer are too many for this model")
        return Sequence((*before, text_segment([*ids, *tail.ids.tolist()], target=True)))

    def ends(self, words: Words) -> tuple[int, ...]:
        """The end of a text, and what ends an answer in the chat template."""
        end = end_of_turn(words)
        return tuple(dict.fromkeys((words.vocabulary.eos_id, *(() if end is None else (end,)))))

    def completion(self, words: Words, text: str, ids: Tensor) -> str:
        """A model is shown a text without space at its end: what follows brings its own."""
        said = self.continued(words, ids)
        return said.removeprefix(" ") if text[-1:].isspace() else said

    def decode(self, words: Words, ids: Tensor) -> str:
        """Special tokens that a text names are part of it."""
        return str(words.tokenizer.decode(self.written(words, ids).tolist()))


def _write(words: Words, text: Tensor, hole: Tensor, picture: Codes | None) -> Ask:
    """A text whose beginning [n] has holes, under a picture."""
    write = torch.zeros(text.shape, dtype=torch.bool)
    write[: len(hole)] = hole
    nothing = _nothing(words) if picture is None else Codes.blank(words, picture.grid)
    return _ask(
        _document(words, picture or nothing, text, write=write),
        _document(words, nothing, text, write=write),
    )


def _nothing(words: Words) -> Codes | None:
    """What stands beside a text alone: a model of fixed slots has always seen a picture."""
    if words.grid is None or words.slots is None:
        return None
    return Codes.blank(words, words.grid)


def _ask(document: Sequence, opposite: Sequence) -> Ask:
    """The text is the result: it is the last segment."""
    return Ask(document, (opposite,), shown=(len(document.segments) - 1,))


def _document(
    words: Words, picture: Codes | None, text: Tensor, *, write: Tensor | None = None
) -> Sequence:
    """`begin image, codes [K], end image, text [T]`, all of them ids.

    write  [T] bool, which tokens of the text are targets; None: none
    """
    context = torch.zeros(text.shape, dtype=torch.bool)
    written = Segment(Modality.TEXT, text, context if write is None else write)
    return Sequence((*_beside(words, picture), written))


def _beside(words: Words, picture: Codes | None) -> tuple[Segment, ...]:
    if picture is None:
        return ()
    begin, end = map(control_segment, words.vocabulary.image_markers)
    return begin, Segment(Modality.IMAGE, picture.ids, picture.open), end
