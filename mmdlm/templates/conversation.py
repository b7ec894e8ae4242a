"""Turn messages as users write them into turns: check roles, put images in their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmdlm.templates.prompt_template import ImageInput, Turn

IMAGE = "<image>"  # where an image stands in a message
SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]  # {"role": ..., "content": ...}


def check_messages(messages: Sequence[Message], images: int) -> None:
    """Raise ValueError unless this is a conversation that the assistant can continue.

    Each message is {"role": "system" | "user" | "assistant", "content": text}; a system message
    comes first, the last one is the user's, and each `<image>` has one of the images; where the
    assistant says `<image>`, it is text.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            f"a conversation is a list of messages, not {type(messages).__name__}; write "
            '[{"role": "user", "content": "..."}]'
        )
    if not messages:
        raise ValueError("the conversation is empty; give it at least one message of the user")
    for number, message in enumerate(messages, 1):
        _check_message(message, number)
    roles = [message["role"] for message in messages]
    if SYSTEM in roles[1:]:
        raise ValueError(
            f"message {roles.index(SYSTEM, 1) + 1} is the system's, which comes first or not at all"
        )
    spoken = roles[1:] if roles[0] == SYSTEM else roles
    if not spoken:
        raise ValueError("the conversation has only a system message; add one of the user")
    if spoken[0] == ASSISTANT:
        raise ValueError("the conversation starts with the assistant; start it with the user")
    if spoken[-1] == ASSISTANT:
        raise ValueError(
            "the conversation ends with the assistant; end it with a message of the user to be "
            "answered"
        )
    places = sum(len(_parts(message)) - 1 for message in messages)
    if places != images:
        raise ValueError(
            f"the conversation has {_count(places, f'{IMAGE} placeholder')} but was given "
            f"{_count(images, 'image')}; write one {IMAGE} for each"
        )


def turns_of(messages: Sequence[Message], images: Sequence[ImageInput]) -> tuple[Turn, ...]:
    """Turn checked messages into turns; the images stand where their placeholders stood."""
    check_messages(messages, len(images))
    rest = iter(images)
    turns = []
    for message in messages:
        first, *others = _parts(message)
        parts: list[str | ImageInput] = [first]
        for text in others:
            parts += [next(rest), text]
        turns.append(Turn(message["role"], tuple(part for part in parts if part != "")))
    return tuple(turns)


def _parts(message: Message) -> list[str]:
    """Return what is said between the places of images."""
    said = message["content"].strip()
    return [said] if message["role"] == ASSISTANT else said.split(IMAGE)


def _check_message(message: Message, number: int) -> None:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise ValueError(
            f'message {number} is {message!r}; a message is {{"role": ..., "content": ...}}'
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role!r}, not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(
            f"message {number} has {type(content).__name__} for content; give it text, with "
            f"{IMAGE} where an image belongs"
        )
    if not content.strip():
        raise ValueError(f"message {number}, of the {role}, is empty; say something in it")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
