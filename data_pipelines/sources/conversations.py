"""Conversations: messages in turns, with images wherever they are mentioned; answers are learned.

How they are laid out is the model's own affair: `mmdlm.templates` asks and teaches by one template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, ClassVar, Literal

import torch

from data_pipelines.shards.shards import Sample
from data_pipelines.sources.end_of_text import FilledTail, Tail
from data_pipelines.sources.messages import Message, messages_of
from data_pipelines.sources.source import (
    BROKEN_CONTENT,
    LONGEST_TOKEN,
    Source,
    TextTokenizer,
    field_codes,
    field_names,
    read_array,
)
from data_pipelines.sources.text_files import parsed
from data_pipelines.sources.vision_samples import IMAGE_FIELD, Seeing, numbered
from mmdlm.core.sequence import Sequence, text_segment
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.templates.conversation import ASSISTANT, IMAGE, SYSTEM, USER
from mmdlm.templates.native import ABOUT_IMAGES
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.templates.task_prompt import Codes, ImageInput, Turn, said
from mmdlm.templates.text_codec import TextCodec
from mmdlm.vision.encoders.crops import CropViews

THOUGHT = "<think>"  # how an answer begins that was thought about
CODES = re.compile(r"(?:(\d+)\.)?codes\.npy")


@dataclass(frozen=True)
class Conversation(Seeing):
    """A conversation in the layout of the model that is trained; answers are targets.

    The JSON has {"messages": [{"role", "content"}]}, whose content is a text or a list of
    {"type": "text", "text"} and {"type": "image"}; LLaVA's {"conversations": [{"from", "value"}]};
    or {"prompt", "completion"}, each a text or messages. A "system" beside them is their first
    message, where they have none; an answer with "weight" 0 (or "train" false) is context.
    `data_pipelines.write_shards conversations` writes such shards. What follows the last answer
    that is learned is left out.

    Attributes:
        answers: "every" answer at once, under full attention, as LLaDA-V trains them
            (arXiv:2505.16933, section 3.2); "one" at random, with all that was said before it, as
            LaViDa (arXiv:2505.16839, section 3.3; its code forgets what was said before); or the
            only the "last".
        tail: What follows the last answer.
        system: First message of conversations that have no system message; empty for none but what
            the layout has.
        thinking: An answer in words that begins with <think> is asked for in the way in which the
            layout asks to think; otherwise questions stay as they are.
        cut_long_answers: Cut the last answer where the row ends, without what ends it; otherwise a
            conversation that needs a longer row counts as broken and is skipped.
        drop_prompt: Share of answers that are an image alone whose prompt is left out, for
            classifier-free guidance.
        template: False: a question and its answer are learned as a task without conversation: a
            text that goes on as `Model.complete` asks, a prompt and its image as `text_to_image`
            does, an image and its caption as `caption` does.
        image: The mark of an image in a text.
        field: Of the JSON.
    """

    answers: Literal["every", "one", "last"] = "every"
    tail: Tail = FilledTail()
    system: str = ""
    thinking: bool = False
    cut_long_answers: bool = False
    drop_prompt: float = 0.0
    template: bool = True
    image: str = IMAGE
    field: str = "json"

    needs_eyes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.image:
            raise ValueError("image is empty; name the mark of an image, such as <image>")
        if self.answers not in ("every", "one", "last"):
            raise ValueError(f"answers {self.answers!r} is not one of every, one, last")
        if not 0 <= self.drop_prompt <= 1:
            raise ValueError(f"drop_prompt is {self.drop_prompt}; a share lies in [0, 1]")

    def sequence(
        self,
        sample: Sample,
        views: list[CropViews],
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Sequence:
        raise AssertionError("`apply_chat_template` gives conversations the layout of a model")

    def teaches(self, samples: Iterable[Sample]) -> frozenset[str]:
        """Return what the last answers of some conversations are: texts or images, and of what."""
        found: set[str] = set()
        for sample in samples:
            with suppress(*BROKEN_CONTENT):  # the loader reports it
                found |= self.taught_by(self.learned(self.content(sample)))
        return frozenset(found)

    def learned(self, content: Any) -> list[Message]:
        """Return the messages up to the last learned one; ValueError where there is none."""
        return self.messages(content)

    def taught_by(self, messages: list[Message]) -> frozenset[str]:
        """Return the tasks that one conversation teaches."""
        *asked, answer = messages
        before = "".join(one.text for one in asked)
        about_images = self.image in before
        if self.image in answer.text:
            edits = self.template and about_images and before.replace(self.image, "").strip()
            return frozenset({"edit"} if edits else {"text_to_image", "inpaint"})
        if not self.template:
            return frozenset({"caption"} if about_images else {"complete"})
        return frozenset({"answer", "chat", *([ABOUT_IMAGES] if about_images else [])})

    def templated(
        self, prompt_template: PromptTemplate, codec: TextCodec, *, length: int
    ) -> Seeing:
        """Return the source with the template of one model, for rows of one length."""
        return TemplatedConversation(self, prompt_template, codec, length)

    def content(self, sample: Sample) -> Any:
        """Return the JSON of a sample; ValueError where it has none."""
        if self.field not in sample:
            raise ValueError(
                f"no {self.field!r} among its fields ({', '.join(field_names(sample))})"
            )
        return parsed(sample[self.field])

    def messages(self, content: Any) -> list[Message]:
        """Messages up to the last answer, the system's first; ValueError where they are none."""
        messages = messages_of(content, image=self.image)
        if self.system and messages[0].role != SYSTEM:
            messages.insert(0, Message(SYSTEM, self.system))
        return messages


@dataclass(frozen=True)
class TemplatedConversation(Seeing):
    """Conversations in the layout of one model, in rows of one length."""

    conversation: Conversation
    prompt_template: PromptTemplate
    codec: TextCodec
    length: int

    needs_eyes: ClassVar[bool] = False

    def sequence(
        self,
        sample: Sample,
        views: list[CropViews],
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Sequence:
        messages = self.conversation.messages(self.conversation.content(sample))
        return self.document(messages, self.images(sample, views), generator=generator)

    def document(
        self, messages: list[Message], images: list[ImageInput], *, generator: torch.Generator
    ) -> Sequence:
        """Return a conversation as a document: learned answers as targets, ends of text behind."""
        turns = self._turns(messages, images)
        learned = [n for n, one in enumerate(messages) if one.role == ASSISTANT and one.learned]
        turns, answers = self._learned(turns, learned, generator=generator)
        turns = self._bounded(turns)
        if self.conversation.template:
            taught = self._taught(turns, answers, generator=generator)
        else:
            taught = self.prompt_template.untemplated_sequence(self.codec, turns)
        if self.conversation.cut_long_answers:
            taught = _cut(taught, self.length)
        answer = _trailing_targets(taught)
        if not answer:  # it ends in an image, which no end of text follows
            return taught
        room = self.length - len(taught)
        count = self.conversation.tail.count(answer=answer, room=room, generator=generator)
        tail = text_segment([self.codec.vocabulary.eos_id] * max(0, min(count, room)), target=True)
        return Sequence((*taught.segments, tail))

    def _taught(
        self, turns: tuple[Turn, ...], answers: list[int], *, generator: torch.Generator
    ) -> Sequence:
        """Return turns in the template; of an edit, sometimes a branch of its guidance."""
        if self.conversation.drop_prompt and (edited := self.prompt_template.image_edit(turns)):
            instruction, sources, image = edited
            task_prompt = self.prompt_template.edit_prompt(
                self.codec, instruction, sources=sources, image=image
            )
            if float(torch.rand((), generator=generator)) < self.conversation.drop_prompt:
                branch = int(torch.randint(len(task_prompt.unconditional), (), generator=generator))
                return task_prompt.unconditional[branch]
            return task_prompt.sequence
        return self.prompt_template.training_sequence(self.codec, turns, answers=answers)

    def _learned(
        self, turns: tuple[Turn, ...], answers: list[int], *, generator: torch.Generator
    ) -> tuple[tuple[Turn, ...], list[int]]:
        """Return the turns up to the last learned one, and the numbers of the learned ones.

        Args:
            turns: The conversation.
            answers: Numbers of the turns that may be learned.
            generator: Chooses among the answers.
        """
        match self.conversation.answers:
            case "one":
                drawn = int(torch.randint(len(answers), (), generator=generator))
                answers = [answers[drawn]]
            case "last":
                answers = answers[-1:]
        turns = turns[: answers[-1] + 1]
        if self.conversation.thinking:
            for number in answers:
                in_words = all(isinstance(part, str) for part in turns[number].parts)
                if in_words and said(turns[number]).startswith(THOUGHT):
                    asked = self.prompt_template.thinking(turns[:number], True)
                    turns = (*asked, *turns[number:])
        is_edit = self.prompt_template.image_edit(turns) is not None
        if (
            self.conversation.drop_prompt
            and not is_edit
            and (to_draw := self.prompt_template.drawing(turns))
        ):
            chance = float(torch.rand((), generator=generator))
            if not to_draw[1] and chance < self.conversation.drop_prompt:
                turns = (Turn(USER, ()), turns[-1])
        return turns, answers

    def _turns(self, messages: list[Message], images: list[ImageInput]) -> tuple[Turn, ...]:
        """Messages with the images in their places."""
        mark = self.conversation.image
        marks = sum(message.text.count(mark) for message in messages)
        if marks != len(images):
            raise ValueError(
                f"its messages mention {marks} images by {mark!r}, but it has {len(images)}"
            )
        rest = iter(images)
        turns = []
        for message in messages:
            text = message.text.strip() if self.conversation.template else message.text
            first, *others = text.split(mark)
            parts: list[str | ImageInput] = [first]
            for text in others:
                parts += [next(rest), text]
            turns.append(Turn(message.role, tuple(part for part in parts if part != "")))
        return tuple(turns)

    def _bounded(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """Return the turns; ValueError where a row cannot hold them, before they are tokenized."""
        most = LONGEST_TOKEN * self.length  # characters
        if self.conversation.cut_long_answers:
            parts = (part[:most] if isinstance(part, str) else part for part in turns[-1].parts)
            turns = (*turns[:-1], replace(turns[-1], parts=tuple(parts)))
        for some in (turns[:-1], turns[-1:]):
            characters = sum(len(said(turn)) for turn in some)
            if characters > most:
                raise ValueError(
                    f"{characters} characters of its messages do not fit in a row of "
                    f"{self.length} tokens; shorten them or raise length"
                )
        return turns

    def images(self, sample: Sample, views: list[CropViews]) -> list[ImageInput]:
        """Return the images of a sample as the model sees them; ValueError where it sees none."""
        if self.prompt_template.sees == "features" and views:
            return list(views)
        codes = numbered(sample, CODES)
        found = codes or numbered(sample, IMAGE_FIELD)
        if found and self.prompt_template.sees != "codes":
            raise ValueError(
                f"it has images ({', '.join(found)}), but this model "
                f"({self.prompt_template.family}) sees none; give it `vision`, or train on "
                "conversations without"
            )
        if found and not codes:
            raise ValueError(
                f"it has images ({', '.join(found)}), but no codes of them; "
                "data_pipelines.tokenize_images adds them"
            )
        return [self._codes(sample, name) for name in codes]

    def _codes(self, sample: Sample, name: str) -> Codes:
        """Codes with their grid: that of the array, or a square."""
        shape = read_array(sample[name]).shape
        codes = field_codes(sample, self.codec.vocabulary, field=name)
        grid = shape if len(shape) == 2 else (isqrt(len(codes)),) * 2
        if grid[0] * grid[1] != len(codes):
            raise ValueError(
                f"its {name} has {len(codes)} codes, no square; store them in rows and columns"
            )
        if self.prompt_template.square and self.codec.grid not in (None, grid):
            raise ValueError(
                f"its {name} has {grid[0]} x {grid[1]} codes, but an image of this model "
                f"({self.prompt_template.family}) has {' x '.join(map(str, self.codec.grid))}"
            )
        return Codes.given(self.codec.vocabulary.image_ids(codes), (grid[0], grid[1]))


def apply_chat_template(
    sources: Iterable[Source],
    prompt_template: PromptTemplate,
    codec: TextCodec,
    *,
    length: int,
    packed: bool,
) -> list[Source]:
    """Return the sources, with conversations in the template of the model that is trained.

    Args:
        sources: Of one model.
        prompt_template: Of the model.
        codec: Text tokenizer of the model.
        length: Tokens of a row.
        packed: Whether several documents share a row.

    Returns:
        As many sources, in the same order.

    Raises:
        ValueError: For a tail that the rows have no room for.
    """
    templated = []
    for source in sources:
        if isinstance(source.to_sequence, Conversation):
            source.to_sequence.tail.check(packed=packed)
            to_sequence = source.to_sequence.templated(prompt_template, codec, length=length)
            source = replace(source, to_sequence=to_sequence)
        templated.append(source)
    return templated


def _trailing_targets(sequence: Sequence) -> int:
    """Tokens of the answer that ends a document."""
    target = torch.cat([segment.target for segment in sequence.segments])
    context = (~target).nonzero()
    return len(target) - (int(context[-1]) + 1 if len(context) else 0)


def _cut(sequence: Sequence, length: int) -> Sequence:
    """Return the document without the part of its last answer that lies behind `length`.

    One whose answer begins behind it stays as it is.
    """
    excess = len(sequence) - length
    if excess <= 0 or excess >= _trailing_targets(sequence):
        return sequence
    segments = list(sequence.segments)
    while excess >= len(segments[-1].ids):
        excess -= len(segments.pop().ids)
    if excess:
        segments[-1] = text_segment(segments[-1].ids[:-excess], target=True)
    return Sequence(tuple(segments))
