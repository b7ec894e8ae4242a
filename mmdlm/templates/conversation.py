"""Turn messages as users write them into turns: check roles, put images in their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mmdlm.templates.task_prompt import ImageInput, Turn

IMAGE = "<image>"  # where an image stands in a message
SYSTEM, USER, ASSISTANT, TOOL = ROLES = ("system", "user", "assistant", "tool")
# Keys beside role and content, as OpenAI and transformers have them: a chat template reads them.
FIELDS: Mapping[str, tuple[str, ...]] = {ASSISTANT: ("tool_calls",), TOOL: ("tool_call_id", "name")}
SOURCES = ("image", "url", "path", "base64")  # of a part of type "image", as in transformers

# {"role": ..., "content": text, or a list of parts}
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where an image stands in a message.

    Attributes:
        image: The image that the message brings; None: one of those beside the messages.
    """

    image: Any = None


def images_in(messages: Sequence[Message], given: Sequence[Any]) -> list[Any]:
    """List the images of a conversation as they are read: those in it, and those beside it.

    Args:
        messages: The conversation.
        given: One for each `<image>` and for each part {"type": "image"} without an image.

    Returns:
        An image for each place.

    Raises:
        ValueError: For messages that are none, or more or fewer images than places for them.
    """
    _check_form(messages)
    places = [part for one in messages for part in _parts(one) if isinstance(part, Place)]
    empty = sum(place.image is None for place in places)
    if empty != len(given):
        raise ValueError(
            f"the conversation has {_count(empty, f'{IMAGE} placeholder')} but was given "
            f"{_count(len(given), 'image')}; write one {IMAGE} for each"
        )
    rest = iter(given)
    return [next(rest) if place.image is None else place.image for place in places]


def check_messages(messages: Sequence[Message], images: int) -> None:
    """Raise ValueError unless this is a conversation that the assistant can continue.

    Each message is {"role": "system" | "user" | "assistant" | "tool", "content": text or parts}; a
    system message comes first, the last one is the user's or a tool's, what a tool says follows the
    assistant, and each place of an image has one of the images. Parts are {"type": "text", "text":
    ...}, {"type": "image", "image": ...} and {"type": "image_url", "image_url": {"url": ...}}. In a
    text `<image>` is a place; where the assistant or a tool says it, it is text.

    Args:
        messages: The conversation.
        images: Number of images, those in the messages included.
    """
    _check_form(messages)
    roles = [message["role"] for message in messages]
    if SYSTEM in roles[1:]:
        raise ValueError(
            f"message {roles.index(SYSTEM, 1) + 1} is the system's, which comes first or not at all"
        )
    spoken = roles[1:] if roles[0] == SYSTEM else roles
    if not spoken:
        raise ValueError("the conversation has only a system message; add one of the user")
    if spoken[0] != USER:
        speaker = f"the {spoken[0]}"
        raise ValueError(f"the conversation starts with {speaker}; start it with the user")
    for number, (before, role) in enumerate(pairwise(roles), 2):
        if role == TOOL and before not in (ASSISTANT, TOOL):
            raise ValueError(
                f"message {number} is a tool's and follows the {before}; it must follow the "
                "assistant's message with its tool_calls"
            )
    if spoken[-1] == ASSISTANT:
        raise ValueError(
            "the conversation ends with the assistant; end it with a message of the user to be "
            "answered"
        )
    places = sum(isinstance(part, Place) for message in messages for part in _parts(message))
    if places != images:
        raise ValueError(
            f"the conversation has {_count(places, f'{IMAGE} placeholder')} but was given "
            f"{_count(images, 'image')}; write one {IMAGE} for each"
        )


def turns_of(messages: Sequence[Message], images: Sequence[ImageInput]) -> tuple[Turn, ...]:
    """Turn checked messages into turns; the images stand in their places, as they are read."""
    check_messages(messages, len(images))
    rest = iter(images)
    turns = []
    for message in messages:
        parts = [next(rest) if isinstance(part, Place) else part for part in _parts(message)]
        fields = {name: message[name] for name in message if name not in ("role", "content")}
        turns.append(Turn(message["role"], tuple(part for part in parts if part != ""), fields))
    return tuple(turns)


def _check_form(messages: Sequence[Message]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            f"a conversation is a list of messages, not {type(messages).__name__}; write "
            '[{"role": "user", "content": "..."}]'
        )
    if not messages:
        raise ValueError("the conversation is empty; give it at least one message of the user")
    for number, message in enumerate(messages, 1):
        _check_message(message, number)


def _parts(message: Message) -> list[str | Place]:
    """Return what is said, and the places of images, in reading order."""
    content = message["content"]
    if content is None:
        return []
    if isinstance(content, str):
        said = content.strip()
        if message["role"] in (ASSISTANT, TOOL):
            return [said]
        first, *others = said.split(IMAGE)
        return [first, *(part for text in others for part in (Place(), text))]
    parts: list[str | Place] = [
        part["text"] if part["type"] == "text" else Place(_source(part)) for part in content
    ]
    if isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


def _source(part: Mapping[str, Any]) -> Any:
    """Return the image that a part brings; None: it brings none."""
    if part["type"] == "image_url":
        url = part["image_url"]
        return url["url"] if isinstance(url, Mapping) else url
    found = [part[name] for name in SOURCES if part.get(name) is not None]
    if found and part.get("base64") is not None:
        return f"data:image/png;base64,{found[0]}"
    return found[0] if found else None


def _check_message(message: Message, number: int) -> None:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise ValueError(
            f'message {number} is {message!r}; a message is {{"role": ..., "content": ...}}'
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role!r}, not one of {', '.join(ROLES)}")
    known = FIELDS.get(role, ())
    if strays := [name for name in message if name not in ("role", "content", *known)]:
        raise ValueError(
            f"message {number}, of the {role}, has the key {strays[0]!r}; known are "
            f"{', '.join(('role', 'content', *known))}"
        )
    if message.get("tool_calls") and not content:
        return  # the assistant calls, and says nothing
    if isinstance(content, list | tuple):
        for part in content:
            _check_part(part, role, number)
        is_empty = not any(part["type"] != "text" or part["text"].strip() for part in content)
    elif isinstance(content, str):
        is_empty = not content.strip()
    else:
        raise ValueError(
            f"message {number} has {type(content).__name__} for content; give it text, with "
            f"{IMAGE} where an image belongs, or a list of parts"
        )
    if is_empty and role != TOOL:
        raise ValueError(f"message {number}, of the {role}, is empty; say something in it")


def _check_part(part: object, role: str, number: int) -> None:
    here = f"message {number} has the part {str(part)[:80]}"
    if not isinstance(part, Mapping) or part.get("type") not in ("text", "image", "image_url"):
        raise ValueError(f'{here}; a part has the type "text", "image" or "image_url"')
    kind = part["type"]
    if kind == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f'{here}; write {{"type": "text", "text": "..."}}')
    if kind == "image_url":
        url = part.get("image_url")
        if not isinstance(url.get("url") if isinstance(url, Mapping) else url, str):
            raise ValueError(
                f'{here}; write {{"type": "image_url", "image_url": {{"url": "..."}}}}'
            )
    if kind != "text" and role in (ASSISTANT, TOOL):
        raise ValueError(f"{here}; images stand in messages of the user and of the system")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
