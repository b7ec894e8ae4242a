"""Messages of conversations, in any of the forms in which data sets have them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from data_pipelines.sources.tools import CALLS, in_words
from mmdlm.templates.conversation import ASSISTANT, IMAGE, SYSTEM, USER, check_messages
from mmdlm.templates.infill import shortened

# Names that LLaVA and ShareGPT give the sides of a conversation -> ours.
ROLES = {
    "human": USER,
    **dict.fromkeys(("gpt", "chatgpt", "model", "bing", "bard", "bot", "claude"), ASSISTANT),
    "developer": SYSTEM,
}
SYSTEMS = ("system", "system_prompt")  # where data sets keep a system message beside the others
# Where the JSON of a sample has messages, or texts, of a conversation or of a pair of answers.
SAID = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
LEARNED = ("weight", "train")  # how they say of an answer whether it is learned
MESSAGE_KEYS = ("role", "content", "from", "value", *LEARNED, *CALLS)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `text` says with a mark where its images stand.

    Attributes:
        learned: False for an answer that is context, and no target.
    """

    role: str
    text: str
    learned: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the message as a dict that `message_of` reads."""
        weight = {} if self.learned else {"weight": 0}
        return {"role": self.role, "content": self.text, **weight}


def messages_of(content: Any, *, image: str = IMAGE) -> list[Message]:
    """Return a conversation in any of the forms of `Conversation`, up to its last answer.

    That is the last which is learned.

    Raises ValueError where it is none, starts with the assistant, or has no answer to learn.
    """
    return up_to_answer(all_messages(content, image=image))


def all_messages(content: Any, *, image: str = IMAGE) -> list[Message]:
    """Return the messages in any form, the system's first; ValueError where there are none."""
    given = given_messages(content)
    if (system := system_of(content)) and not has_system(given):
        given = [{"role": SYSTEM, "content": system}, *given]
    return [message_of(one, image=image) for one in in_words(content, given)]


def has_system(messages: list[Any]) -> bool:
    """Return whether the first of some messages, in any form, is the system's."""
    first = messages[0] if messages else None
    role = first.get("role", first.get("from")) if isinstance(first, dict) else None
    return ROLES.get(str(role), role) == SYSTEM


def up_to_answer(messages: list[Message]) -> list[Message]:
    """Return the messages up to the last answer that is learned; see `messages_of`."""
    answers = [n for n, one in enumerate(messages) if one.role == ASSISTANT]
    last = max((n for n in answers if messages[n].learned), default=None)
    if last is None and answers:
        raise ValueError("all its answers have weight 0, so that there is nothing to learn")
    if last is None:
        names = ", ".join(sorted({repr(one.role) for one in messages}))
        raise ValueError(
            f"its {len(messages)} messages hold no answer of an assistant, but are of {names}"
        )
    asked, answer = messages[:last], messages[last]
    for number, (before, current) in enumerate(pairwise(messages[: last + 1]), 2):
        if before.role == current.role == ASSISTANT:
            raise ValueError(f"message {number} is the second of the assistant in a row")
    # What asks for the answer; the marks of images are counted where the images are.
    plain = [{"role": one.role, "content": one.text.replace(IMAGE, "-")} for one in messages]
    check_messages(plain[: last + all(one.role in (SYSTEM, ASSISTANT) for one in asked)], 0)
    if not answer.text.strip():
        raise ValueError(f"message {last + 1}, of the assistant, is empty; say something in it")
    return [*asked, answer]


def given_messages(content: Any) -> list[Any]:
    """Return the messages of a conversation as they stand in it; ValueError for none."""
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
    """Return the system message beside the others; empty for none."""
    for name in SYSTEMS:
        text = content.get(name) if isinstance(content, dict) else None
        if text is not None and not isinstance(text, str):
            raise ValueError(f"its {name!r} is no text but {type(text).__name__}")
        if text and text.strip():
            return text
    return ""


def message_of(content: Any, *, image: str = IMAGE) -> Message:
    """Return a message of any of the forms; ValueError where it is none."""
    if not isinstance(content, dict):
        raise ValueError(f"a message is no object but {shortened(repr(content))}")
    role = content.get("role", content.get("from"))
    text = content.get("content", content.get("value"))
    if isinstance(text, list):
        text = "".join(_piece(piece, image) for piece in text)
    if not isinstance(role, str) or not isinstance(text, str):
        raise ValueError(f"a message has no role and text: {shortened(repr(content))}")
    return Message(ROLES.get(role, role), text, all(_is_learned(content, key) for key in LEARNED))


def _is_learned(message: dict[str, Any], key: str) -> bool:
    weight = message.get(key)
    if weight is not None and weight not in (0, 1):
        raise ValueError(f"a message has the {key} {weight!r}, but it is learned (1) or not (0)")
    return weight is None or bool(weight)


def _piece(piece: Any, image: str) -> str:
    match piece:
        case {"type": "text" | "input_text" | "output_text", "text": str(text)}:
            return text
        case {"type": "image" | "image_url" | "input_image"}:
            return image
    raise ValueError(f"a piece of a message is neither text nor image: {shortened(repr(piece))}")
