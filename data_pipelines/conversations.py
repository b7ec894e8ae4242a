"""Conversations: messages in turns, with pictures wherever they are mentioned; answers are learnt.

How they are laid out is the model's own affair: `mmdlm.layouts` asks and teaches by one template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isqrt
from typing import Any, ClassVar, Literal

import torch

from data_pipelines.end_of_text import FilledTail, Tail
from data_pipelines.seen import PICTURE_FIELD, Seeing, numbered
from data_pipelines.shards import Sample
from data_pipelines.source import (
    LONGEST_TOKEN,
    Source,
    TextTokenizer,
    field_codes,
    field_names,
    read_array,
)
from data_pipelines.text_files import parsed
from mmdlm.core.sequence import Sequence, text_segment
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.layouts.conversation import ASSISTANT, IMAGE, SYSTEM, USER, check_messages
from mmdlm.layouts.layout import Codes, Layout, Picture, Turn, said
from mmdlm.layouts.texts import shortened
from mmdlm.layouts.words import Words
from mmdlm.vision.crops import CropViews

# Names that LLaVA and ShareGPT give the sides of a conversation -> ours.
ROLES = {"human": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT}
THOUGHT = "<think>"  # how an answer begins that was thought about
CODES = re.compile(r"(?:(\d+)\.)?codes\.npy")
SYSTEMS = ("system", "system_prompt")  # where data sets keep a system message beside the others
# Where the JSON of a sample has messages, or texts, of a conversation or of a pair of answers.
SAID = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
LEARNT = ("weight", "train")  # how they say of an answer whether it is learnt
MESSAGE_KEYS = ("role", "content", "from", "value", *LEARNT)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `text` says with a mark where its pictures stand.

    learnt  false for an answer that is context, and no target
    """

    role: str
    text: str
    learnt: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The message as `message_of` reads it."""
        weight = {} if self.learnt else {"weight": 0}
        return {"role": self.role, "content": self.text, **weight}


@dataclass(frozen=True)
class Conversation(Seeing):
    """A conversation in the layout of the model that is trained; answers are targets.

    The JSON has {"messages": [{"role", "content"}]}, whose content is a text or a list of
    {"type": "text", "text"} and {"type": "image"}; LLaVA's {"conversations": [{"from", "value"}]};
    or {"prompt", "completion"}, each a text or messages. A "system" beside them is their first
    message, where they have none; an answer with "weight" 0 (or "train" false) is context.
    `data_pipelines.write_shards conversations` writes such shards. What follows the last answer
    that is learnt is left out.

    answers   "every" answer at once, under full attention, as LLaDA-V trains them
              (arXiv:2505.16933, section 3.2); "one" at random, with all that was said before it, as
              LaViDa (arXiv:2505.16839, section 3.3; its code forgets what was said before); or the
              "last" alone
    tail      what follows the last answer
    system    first message of conversations that have no system message; empty for none but what
              the layout has
    thinking  an answer in words that begins with <think> is asked for in the way in which the
              layout asks to think; otherwise questions stay as they are
    cut_long_answers  cut the last answer where the row ends, without what ends it; otherwise a
              conversation that needs a longer row counts as broken and is skipped
    drop_prompt  share of answers that are a picture alone whose prompt is left out, for
              classifier-free guidance
    template  false: a question and its answer are learned as a task without conversation: a text
              that goes on as `Model.complete` asks, a prompt and its image as `text_to_image` does,
              an image and its caption as `caption` does
    picture   the mark of a picture in a text
    field     of the JSON
    """

    answers: Literal["every", "one", "last"] = "every"
    tail: Tail = FilledTail()
    system: str = ""
    thinking: bool = False
    cut_long_answers: bool = False
    drop_prompt: float = 0.0
    template: bool = True
    picture: str = IMAGE
    field: str = "json"

    needs_eyes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.picture:
            raise ValueError("picture is empty; name the mark of a picture, such as <image>")
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
        raise AssertionError("`speak` gives conversations the layout of a model")

    def spoken(self, layout: Layout, words: Words, *, length: int) -> Seeing:
        """The same in the layout of one model, for rows of one length."""
        return Spoken(self, layout, words, length)

    def content(self, sample: Sample) -> Any:
        """The JSON of a sample; ValueError where it has none."""
        if self.field not in sample:
            raise ValueError(
                f"no {self.field!r} among its fields ({', '.join(field_names(sample))})"
            )
        return parsed(sample[self.field])

    def messages(self, content: Any) -> list[Message]:
        """Messages up to the last answer, the system's first; ValueError where they are none."""
        messages = messages_of(content, picture=self.picture)
        if self.system and messages[0].role != SYSTEM:
            messages.insert(0, Message(SYSTEM, self.system))
        return messages


@dataclass(frozen=True)
class Spoken(Seeing):
    """Conversations in the layout of one model, in rows of one length."""

    conversation: Conversation
    layout: Layout
    words: Words
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
        return self.document(messages, self.pictures(sample, views), generator=generator)

    def document(
        self, messages: list[Message], pictures: list[Picture], *, generator: torch.Generator
    ) -> Sequence:
        """A conversation laid out, with what is learnt of it and what follows."""
        turns = self._turns(messages, pictures)
        learnt = [n for n, one in enumerate(messages) if one.role == ASSISTANT and one.learnt]
        turns, answers = self._learnt(turns, learnt, generator=generator)
        turns = self._bounded(turns)
        if self.conversation.template:
            taught = self._taught(turns, answers, generator=generator)
        else:
            taught = self.layout.teach_task(self.words, turns)
        if self.conversation.cut_long_answers:
            taught = _cut(taught, self.length)
        answer = _trailing_targets(taught)
        if not answer:  # it ends in a picture, which no end of text follows
            return taught
        room = self.length - len(taught)
        count = self.conversation.tail.count(answer=answer, room=room, generator=generator)
        tail = text_segment([self.words.vocabulary.eos_id] * max(0, min(count, room)), target=True)
        return Sequence((*taught.segments, tail))

    def _taught(
        self, turns: tuple[Turn, ...], answers: list[int], *, generator: torch.Generator
    ) -> Sequence:
        """Turns by the template; of an edit, now and then, a branch of its guidance."""
        if self.conversation.drop_prompt and (edited := self.layout.image_edit(turns)):
            instruction, sources, image = edited
            ask = self.layout.edit(self.words, instruction, sources=sources, picture=image)
            if float(torch.rand((), generator=generator)) < self.conversation.drop_prompt:
                branch = int(torch.randint(len(ask.opposite), (), generator=generator))
                return ask.opposite[branch]
            return ask.sequence
        return self.layout.teach(self.words, turns, answers=answers)

    def _learnt(
        self, turns: tuple[Turn, ...], answers: list[int], *, generator: torch.Generator
    ) -> tuple[tuple[Turn, ...], list[int]]:
        """The turns up to the last that is learnt, and the numbers of those that are.

        answers  numbers of those that may be learnt
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
                    asked = self.layout.thinking(turns[:number], True)
                    turns = (*asked, *turns[number:])
        is_edit = self.layout.image_edit(turns) is not None
        if self.conversation.drop_prompt and not is_edit and (drawn := self.layout.drawing(turns)):
            chance = float(torch.rand((), generator=generator))
            if not drawn[1] and chance < self.conversation.drop_prompt:
                turns = (Turn(USER, ()), turns[-1])
        return turns, answers

    def _turns(self, messages: list[Message], pictures: list[Picture]) -> tuple[Turn, ...]:
        """Messages with the pictures in their places."""
        mark = self.conversation.picture
        marks = sum(message.text.count(mark) for message in messages)
        if marks != len(pictures):
            raise ValueError(
                f"its messages mention {marks} pictures by {mark!r}, but it has {len(pictures)}"
            )
        rest = iter(pictures)
        turns = []
        for message in messages:
            text = message.text.strip() if self.conversation.template else message.text
            first, *others = text.split(mark)
            parts: list[str | Picture] = [first]
            for text in others:
                parts += [next(rest), text]
            turns.append(Turn(message.role, tuple(part for part in parts if part != "")))
        return tuple(turns)

    def _bounded(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """The turns, with no more to tokenize than a row may hold; ValueError where it is more."""
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

    def pictures(self, sample: Sample, views: list[CropViews]) -> list[Picture]:
        """The pictures of a sample as the model sees them; ValueError where it sees none."""
        if self.layout.sees == "features" and views:
            return list(views)
        codes = numbered(sample, CODES)
        found = codes or numbered(sample, PICTURE_FIELD)
        if found and self.layout.sees != "codes":
            raise ValueError(
                f"it has pictures ({', '.join(found)}), but this model ({self.layout.family}) sees "
                "none; give it `vision`, or train on conversations without"
            )
        if found and not codes:
            raise ValueError(
                f"it has pictures ({', '.join(found)}), but no codes of them; "
                "data_pipelines.tokenize_images adds them"
            )
        return [self._codes(sample, name) for name in codes]

    def _codes(self, sample: Sample, name: str) -> Codes:
        """Codes with their grid: that of the array, or a square."""
        shape = read_array(sample[name]).shape
        codes = field_codes(sample, self.words.vocabulary, field=name)
        grid = shape if len(shape) == 2 else (isqrt(len(codes)),) * 2
        if grid[0] * grid[1] != len(codes):
            raise ValueError(
                f"its {name} has {len(codes)} codes, no square; store them in rows and columns"
            )
        if self.layout.square and self.words.grid not in (None, grid):
            raise ValueError(
                f"its {name} has {grid[0]} x {grid[1]} codes, but an image of this model "
                f"({self.layout.family}) has {' x '.join(map(str, self.words.grid or ()))}"
            )
        return Codes.given(self.words.vocabulary.image_ids(codes), (grid[0], grid[1]))


def speak(
    sources: Iterable[Source], layout: Layout, words: Words, *, length: int, packed: bool
) -> list[Source]:
    """The same sources, conversations among them in the layout of the model that is trained.

    length  of a row

    Raises ValueError for a tail that the rows have no room for.
    """
    spoken = []
    for source in sources:
        if isinstance(source.to_sequence, Conversation):
            source.to_sequence.tail.check(packed=packed)
            to_sequence = source.to_sequence.spoken(layout, words, length=length)
            source = replace(source, to_sequence=to_sequence)
        spoken.append(source)
    return spoken


# ---- messages -----------------------------------------------------------------------------------


def messages_of(content: Any, *, picture: str = IMAGE) -> list[Message]:
    """A conversation in any of the forms that `Conversation` describes, up to its last answer.

    That is the last which is learnt. Raises ValueError where it is none, starts with the assistant,
    or has no answer to learn.
    """
    return up_to_answer(all_messages(content, picture=picture))


def all_messages(content: Any, *, picture: str = IMAGE) -> list[Message]:
    """The messages of a conversation in any form, the system's first; ValueError for none."""
    messages = [message_of(one, picture=picture) for one in _given(content)]
    if (system := system_of(content)) and all(one.role != SYSTEM for one in messages[:1]):
        messages.insert(0, Message(SYSTEM, system))
    return messages


def up_to_answer(messages: list[Message]) -> list[Message]:
    """The messages up to the last answer that is learnt; see `messages_of`."""
    answers = [n for n, one in enumerate(messages) if one.role == ASSISTANT]
    last = max((n for n in answers if messages[n].learnt), default=None)
    if last is None and answers:
        raise ValueError("all its answers have weight 0, so that there is nothing to learn")
    if last is None:
        names = ", ".join(sorted({repr(one.role) for one in messages}))
        raise ValueError(
            f"its {len(messages)} messages hold no answer of an assistant, but are of {names}"
        )
    asked, answer = messages[:last], messages[last]
    for number, (before, here) in enumerate(pairwise(messages[: last + 1]), 2):
        if before.role == here.role == ASSISTANT:
            raise ValueError(f"message {number} is the second of the assistant in a row")
    # What asks for the answer; the marks of pictures are counted where the pictures are.
    plain = [{"role": one.role, "content": one.text.replace(IMAGE, "-")} for one in messages]
    check_messages(plain[: last + all(one.role in (SYSTEM, ASSISTANT) for one in asked)], 0)
    if not answer.text.strip():
        raise ValueError(f"message {last + 1}, of the assistant, is empty; say something in it")
    return [*asked, answer]


def _given(content: Any) -> list[Any]:
    if isinstance(content, dict):
        if "prompt" in content and "completion" in content:
            sides = ((USER, content["prompt"]), (ASSISTANT, content["completion"]))
            return [
                one
                for role, side in sides
                for one in (side if isinstance(side, list) else [{"role": role, "content": side}])
            ]
        for name in ("messages", "conversations"):
            given = content.get(name)
            if isinstance(given, list) and given:
                return given
    raise ValueError("it has neither messages nor conversations, nor a prompt with its completion")


def system_of(content: Any) -> str:
    """The system message beside the others; empty for none."""
    for name in SYSTEMS:
        text = content.get(name) if isinstance(content, dict) else None
        if text is not None and not isinstance(text, str):
            raise ValueError(f"its {name!r} is no text but {type(text).__name__}")
        if text and text.strip():
            return text
    return ""


def message_of(content: Any, *, picture: str = IMAGE) -> Message:
    """A message in any of the forms; ValueError where it is none."""
    if not isinstance(content, dict):
        raise ValueError(f"a message is no object but {shortened(repr(content))}")
    role = content.get("role", content.get("from"))
    text = content.get("content", content.get("value"))
    if isinstance(text, list):
        text = "".join(_piece(piece, picture) for piece in text)
    if not isinstance(role, str) or not isinstance(text, str):
        raise ValueError(f"a message has no role and text: {shortened(repr(content))}")
    return Message(ROLES.get(role, role), text, all(_is_learnt(content, key) for key in LEARNT))


def _is_learnt(message: dict[str, Any], key: str) -> bool:
    weight = message.get(key)
    if weight is not None and weight not in (0, 1):
        raise ValueError(f"a message has the {key} {weight!r}, but it is learnt (1) or not (0)")
    return weight is None or bool(weight)


def _piece(piece: Any, picture: str) -> str:
    match piece:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image" | "image_url"}:
            return picture
    raise ValueError(f"a piece of a message is neither text nor image: {shortened(repr(piece))}")


def _trailing_targets(sequence: Sequence) -> int:
    """Tokens of the answer that ends a document."""
    target = torch.cat([segment.target for segment in sequence.segments])
    context = (~target).nonzero()
    return len(target) - (int(context[-1]) + 1 if len(context) else 0)


def _cut(sequence: Sequence, length: int) -> Sequence:
    """The document without what of its last answer lies behind `length`.

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
