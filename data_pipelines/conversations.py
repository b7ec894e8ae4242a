"""Conversations about pictures: messages in turns, pictures wherever they are mentioned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from data_pipelines.seen import Seeing
from data_pipelines.shards import Sample
from data_pipelines.source import TextTokenizer, field_names
from mmdlm.core.sequence import Segment, Sequence, picture_segment, text_segment
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.vision.crops import CropViews

ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names -> ours


@dataclass(frozen=True)
class Turns:
    """What stands around the messages, in the tokenizer's words: a chat template in three parts.

    start   before the first message
    before  each message, {role} being its role
    after   each message; of an answer it is target too, so that a model learns to end

    The default is that of LLaDA's instruction-tuned models.
    """

    start: str = "<|startoftext|>"
    before: str = "<|start_header_id|>{role}<|end_header_id|>\n\n"
    after: str = "<|eot_id|>"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `text` says with `picture` marks where pictures stand."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation(Seeing):
    """All messages of a conversation, pictures among their words; every answer is target.

    The JSON has {"messages": [{"role", "content"}]}, whose content is a text or a list of
    {"type": "text", "text"} and {"type": "image"}, or LLaVA's {"conversations": [{"from",
    "value"}]}. All answers are masked together, under full attention, as LLaDA-V trains them
    (arXiv:2505.16933, section 3.2); eos closes the whole, and is target.

    turns    what stands around the messages
    system   first message of conversations that have no system message; empty for none
    picture  the mark of a picture in a text
    field    of the JSON
    """

    turns: Turns = Turns()
    system: str = ""
    picture: str = "<image>"
    field: str = "json"

    def __post_init__(self) -> None:
        if not self.picture:
            raise ValueError("picture is empty; name the mark of a picture, such as <image>")

    def sequence(
        self,
        sample: Sample,
        views: list[CropViews],
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Sequence:
        messages = self.messages(sample)
        marks = sum(message.text.count(self.picture) for message in messages)
        if marks != len(views):
            raise ValueError(
                f"its messages mention {marks} pictures by {self.picture!r}, but it has "
                f"{len(views)}"
            )
        pictures = iter(views)
        segments: list[Segment] = []
        for words, target in self._runs(messages):
            if words is None:
                segments.append(picture_segment(next(pictures), vocabulary))
            elif ids := tokenizer.encode(words, add_special_tokens=False):
                segments.append(text_segment(ids, target=target))
        return Sequence((*segments, text_segment([vocabulary.eos_id], target=True)))

    def _runs(self, messages: list[Message]) -> Iterator[tuple[str | None, bool]]:
        """The conversation as (text, whether it is target), None being a picture.

        Texts that nothing parts are one, since a tokenizer may join what stands side by side.
        """
        pieces: list[tuple[str | None, bool]] = [(self.turns.start, False)]
        for message in messages:
            answer = message.role == "assistant"
            pieces.append((self.turns.before.replace("{role}", message.role), False))
            for number, words in enumerate(message.text.split(self.picture)):
                if number:
                    pieces.append((None, False))
                pieces.append((words, answer))
            pieces.append((self.turns.after, answer))
        for (is_text, target), run in groupby(pieces, lambda one: (one[0] is not None, one[1])):
            if is_text:
                yield "".join(words for words, _ in run if words), target
            else:
                yield from run

    def messages(self, sample: Sample) -> list[Message]:
        """The messages of a sample; ValueError where they are none, or none of them an answer."""
        if self.field not in sample:
            raise ValueError(
                f"no {self.field!r} among its fields ({', '.join(field_names(sample))})"
            )
        content = json.loads(sample[self.field])
        names = ("messages", "conversations")
        given = None
        if isinstance(content, dict):
            given = next((content[name] for name in names if name in content), None)
        if not isinstance(given, list) or not given:
            raise ValueError(f"its {self.field} has neither messages nor conversations")
        messages = [self._message(one) for one in given]
        if self.system and messages[0].role != "system":
            messages.insert(0, Message("system", self.system))
        if not any(message.role == "assistant" for message in messages):
            raise ValueError(f"its {len(given)} messages hold no answer of an assistant")
        return messages

    def _message(self, content: Any) -> Message:
        if not isinstance(content, dict):
            raise ValueError(f"a message is no object but {content!r:.60}")
        role = content.get("role", content.get("from"))
        text = content.get("content", content.get("value"))
        if isinstance(text, list):
            text = "".join(self._piece(piece) for piece in text)
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError(f"a message has no role and text: {json.dumps(content):.60}")
        return Message(ROLES.get(role, role), text.strip())

    def _piece(self, piece: Any) -> str:
        match piece:
            case {"type": "text", "text": str(text)}:
                return text
            case {"type": "image" | "image_url"}:
                return self.picture
        raise ValueError(f"a piece of a message is neither text nor image: {json.dumps(piece):.60}")
