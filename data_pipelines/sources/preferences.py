"""Pairs of answers to one prompt, of which one is preferred: two conversations in one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from data_pipelines.jobs.report import Report
from data_pipelines.shards.shards import Sample
from data_pipelines.sources.conversation_files import IMAGES, images_of, packed
from data_pipelines.sources.conversations import Conversation, TemplatedConversation
from data_pipelines.sources.end_of_text import NoTail, Tail
from data_pipelines.sources.messages import SYSTEMS, Message, message_of, messages_of, system_of
from data_pipelines.sources.row_files import Row
from data_pipelines.sources.row_images import Images
from data_pipelines.sources.source import TextTokenizer
from data_pipelines.sources.tools import TOOLS, in_words, offered, uses_tools
from data_pipelines.sources.vision_samples import Seeing
from mmdlm.core.sequence import Sequence
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.templates.conversation import ASSISTANT, IMAGE, SYSTEM, USER
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.templates.text_codec import TextCodec
from mmdlm.vision.encoders.crops import CropViews

SIDES = ("chosen", "rejected")
OPENAI = frozenset({"input", "preferred_output", "non_preferred_output"})  # its columns of a pair


@dataclass(frozen=True)
class Preference(Conversation):
    """Two answers to one prompt in the layout of the model that is trained; both are targets.

    The JSON has {"prompt", "chosen", "rejected"} as data sets of TRL have them: each a text or
    messages; or {"chosen", "rejected"} as whole conversations that differ in their last message.
    `data_pipelines.write_shards preferences` writes such shards. Images are counted through the
    prompt, then the chosen answer, then the rejected one.

    The chosen conversation is a document and the rejected one its partner: they share a row and do
    not see each other. Options are those of `Conversation`, but that only the last answer
    is learned. Tails, and answers that are cut, have half a row each; by default no ends of text
    follow an answer, as LLaDA 1.5 leaves them out of its loss (arXiv:2505.19223).
    """

    answers: Literal["every", "one", "last"] = "last"
    tail: Tail = NoTail()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers != "last" or self.drop_prompt:
            raise ValueError(
                f"answers {self.answers!r}, drop_prompt {self.drop_prompt}: of a pair the last "
                "answers are compared, given their prompt; leave both options out"
            )

    def learned(self, content: Any) -> list[Message]:
        """See `Conversation.learned`: with the chosen answer."""
        pair = explicit(content, image=self.image)
        return self.messages({"messages": [*pair["prompt"], *pair["chosen"]]})

    def templated(
        self, prompt_template: PromptTemplate, words: TextCodec, *, length: int
    ) -> Seeing:
        """See `Conversation.templated`."""
        return SpokenPair(self, TemplatedConversation(self, prompt_template, words, length // 2))


@dataclass(frozen=True)
class SpokenPair(Seeing):
    """Pairs in the layout of one model."""

    preference: Preference
    side: TemplatedConversation

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
        pair = explicit(self.preference.content(sample), image=self.preference.image)
        chosen, rejected = (
            self.preference.messages({"messages": [*pair["prompt"], *pair[side]]}) for side in SIDES
        )
        images = self.side.images(sample, views)
        marks = [message.text.count(self.preference.image) for message in chosen]
        shared, own = sum(marks[:-1]), sum(marks)
        return replace(
            self.side.document(chosen, images[:own], generator=generator),
            partner=self.side.document(
                rejected, [*images[:shared], *images[own:]], generator=generator
            ),
        )


def explicit(content: Any, *, image: str = IMAGE) -> dict[str, list[Any]]:
    """Return prompt, chosen and rejected answer of a pair in any form, as lists of messages.

    Raises ValueError where it is none, or prefers nothing.
    """
    if not isinstance(content, Mapping) or any(content.get(side) is None for side in SIDES):
        raise ValueError("it has no chosen answer with a rejected one")
    system = system_of(content)
    chosen, rejected = (_conversation(content, side, image, system=system) for side in SIDES)
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("its chosen and rejected answers are not to the same prompt")
    if chosen == rejected and image not in message_of(chosen[-1], image=image).text:
        raise ValueError("its chosen and rejected answers are the same")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _conversation(
    content: Mapping[str, Any], side: str, image: str, *, system: str = ""
) -> list[Any]:
    """Return the messages up to an answer, which is a text, or messages with or without prompt.

    Args:
        content: With the prompt, a text or messages; it is not read where the answer holds it.
        side: Name of the answer, a text or messages, which may begin with the prompt.
        image: Text that stands for an image.
        system: First message of conversations that have none.
    """
    messages = _up_to_answer(content.get("prompt"), content[side], side, image)
    if not message_of(messages[-1], image=image).learned:
        raise ValueError(f"its {side} answer has weight 0, so that there is nothing to compare")
    if system and message_of(messages[0], image=image).role != SYSTEM:
        messages = [{"role": SYSTEM, "content": system}, *messages]
    return in_words(content, messages)


def _up_to_answer(prompt: Any, answer: Any, side: str, image: str) -> list[Any]:
    said = [{"role": ASSISTANT, "content": answer}] if isinstance(answer, str) else answer
    if not isinstance(said, list) or not said:
        raise ValueError(f"its {side} answer is neither a text nor messages")
    said = in_words({}, said)
    if message_of(said[-1], image=image).role != ASSISTANT:
        raise ValueError(f"its {side} messages do not end with an answer of the assistant")
    if message_of(said[0], image=image).role != ASSISTANT:
        return said  # the prompt is in it, also where a column repeats it
    asked = [{"role": USER, "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(asked, list) or not asked:
        raise ValueError("its prompt is neither a text nor messages")
    return [*in_words({}, asked), *said]


# ---- rows of files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairColumns:
    """Where a row has its pair.

    Attributes:
        prompt: Columns; none of `prompt` is needed where the others are conversations.
        chosen: Columns; none of `prompt` is needed where the others are conversations.
        rejected: Columns; none of `prompt` is needed where the others are conversations.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    images: Images = Images()

    @property
    def used(self) -> frozenset[str]:
        """The columns that a sample is made of."""
        return frozenset({self.prompt, self.chosen, self.rejected, *IMAGES, *OPENAI})

    def check(self, row: Row, *, source: str) -> None:
        """Raise ValueError that names the columns of a data set without pairs."""
        if row.values.keys() >= OPENAI:
            return
        needed = [self.chosen, self.rejected]
        if isinstance(row.get(self.chosen), str):
            needed.insert(0, self.prompt)
        if missing := [name for name in needed if name not in row.values]:
            raise ValueError(
                f"{source} has the columns {', '.join(row.values)}, but no "
                f"{' and no '.join(missing)}; name columns with --prompt, --chosen and --rejected"
            )

    def sample(self, row: Row, key: str, report: Report) -> Sample:
        """Return a row as a sample, json and its images; ValueError where it is no pair."""
        names = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        values = _of_openai(row.values) if row.values.keys() >= OPENAI else row.values
        given = {name: values.get(column) for name, column in names.items()}
        given |= {name: values.get(name) for name in (*SYSTEMS, *TOOLS)}
        mark = self.images.mark
        pair = explicit(given, image=mark)
        parts = [one for one in given.values() if isinstance(one, list)]
        if offered(given) or any(uses_tools({}, part) for part in parts):
            report.change(row.where, "its tools, their calls and results are written as text")
        said = {name: [message_of(one, image=mark) for one in part] for name, part in pair.items()}
        for side in SIDES:  # what training would find wrong
            messages_of({"messages": [*pair["prompt"], *pair[side]]}, image=mark)
        return packed(
            said, images_of(pair, row.values), key, self.images, where=row.where, report=report
        )


def _of_openai(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of OpenAI's files for preference tuning with the names of TRL."""
    asked = values["input"]
    if not isinstance(asked, Mapping):
        raise ValueError(f"its 'input' is no object but {type(asked).__name__}")
    tools = {name: asked.get(name) for name in TOOLS}
    chosen, rejected = values["preferred_output"], values["non_preferred_output"]
    return {**tools, "prompt": asked.get("messages"), "chosen": chosen, "rejected": rejected}
