"""Edits by instruction, questions and short chats about emoji, as conversations."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipelines.sources.emoji import Emoji
from data_pipelines.sources.emoji_facts import Edit, Facts, edits_of, without_skin_tones
from mmdlm.templates.conversation import ASSISTANT, IMAGE, USER

NUMBERS = ("none", "one", "two", "three", "four")
QUESTIONS = {  # kind -> how it is asked; the kinds are those of `answers_of`
    "group": ("what group is it in?", "which group does it belong to?"),
    "animal": ("is it an animal?", "does it show an animal?"),
    "food": ("is it food or drink?", "can one eat or drink it?"),
    "tone": ("which skin tone is it?", "what skin tone does it have?"),
    "people": ("how many people are there?", "how many people does it show?"),
    "style": ("what style is it?", "in which style is it drawn?"),
    "name": ("what is it?", "what does it show?"),
}
STYLE_EDIT = "in {style} style"


@dataclass(frozen=True)
class Task:
    """One conversation about one image or from one image to another.

    Attributes:
        kind: "edit/tone", "question/animal", "chat" and so on.
        images: Keys of the images that the messages mention, in order.
        turns: What user and assistant say in turn; `IMAGE` stands for an image.
    """

    kind: str
    images: tuple[str, ...]
    turns: tuple[str, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as messages with roles."""
        roles = (USER, ASSISTANT)
        return [
            {"role": roles[number % 2], "content": turn} for number, turn in enumerate(self.turns)
        ]

    @property
    def order(self) -> bytes:
        """A place in an order that depends only on the task."""
        return hashlib.sha256(repr((self.kind, self.images, self.turns)).encode()).digest()


def answers_of(facts: Facts, style: str) -> dict[str, str]:
    """Return the answer to each kind of question that can be asked about an emoji."""
    answers = {
        "group": facts.group,
        "style": style,
        "animal": "yes" if facts.is_animal else "no",
        "food": "yes" if facts.group == "food and drink" else "no",
        "name": facts.name,
    }
    if len(facts.tones) == 1:
        answers["tone"] = facts.tones[0]
    elif facts.people == 1 and not facts.tones:
        answers["tone"] = "none"
    if facts.people is not None:
        answers["people"] = NUMBERS[facts.people]
    return answers


def questions(emoji: Iterable[Emoji], *, at_most: int) -> list[Task]:
    """Return questions about these emoji, each kind with its answers as often as each other.

    Answers that are rarer than the others come as often as they can; yes and no come equally often.

    Args:
        emoji: To ask about.
        at_most: Tasks of one kind.

    Returns:
        Tasks of all kinds.
    """
    found: dict[str, dict[str, list[Task]]] = defaultdict(lambda: defaultdict(list))
    for one in emoji:
        if one.facts is None:
            continue
        for kind, answer in answers_of(one.facts, one.style).items():
            for question in QUESTIONS[kind]:
                task = Task(f"question/{kind}", (one.key,), (f"{IMAGE} {question}", answer))
                found[kind][answer].append(task)
    chosen = []
    for kind, by_answer in found.items():
        share = max(1, at_most // len(by_answer)) if kind != "name" else 1
        if by_answer.keys() == {"yes", "no"}:
            share = min(share, *map(len, by_answer.values()))
        for tasks in by_answer.values():
            chosen += first_of(tasks, share)
    return chosen


def chats(emoji: Iterable[Emoji], *, at_most: int) -> list[Task]:
    """Return chats of three questions about one image, no two of the same kind."""
    found = []
    for one in emoji:
        if one.facts is None:
            continue
        answers = answers_of(one.facts, one.style)
        kinds = sorted(answers, key=lambda kind: _digest(one.key, kind))[:3]
        turns = []
        for number, kind in enumerate(kinds):
            asked = QUESTIONS[kind][_digest(kind, one.key)[0] % 2]
            turns += [f"{IMAGE} {asked}" if number == 0 else asked, answers[kind]]
        found.append(Task("chat", (one.key,), tuple(turns)))
    return first_of(found, at_most)


def edits(emoji: Sequence[Emoji]) -> list[Task]:
    """Return all edits between these emoji: what `edits_of` finds in a style, and other styles."""
    by_style: dict[str, dict[str, Emoji]] = defaultdict(dict)
    for one in emoji:
        by_style[one.style][one.name] = one
    found = []
    for style, named in by_style.items():
        for edit in edits_of(named):
            images = (named[edit.source].key, named[edit.target].key)
            kind = f"edit/{_kind(edit)}"
            found.append(Task(kind, images, (f"{IMAGE} {edit.instruction}", IMAGE)))
        for other, targets in by_style.items():
            if other != style:
                instruction = STYLE_EDIT.format(style=other)
                for name in named.keys() & targets.keys():
                    images = (named[name].key, targets[name].key)
                    found.append(Task("edit/style", images, (f"{IMAGE} {instruction}", IMAGE)))
    return sorted(found, key=lambda task: task.order)


def split_edits(tasks: Iterable[Task], *, held_out: int) -> tuple[list[Task], list[Task]]:
    """Return edits to train on and edits to measure: as many of each kind, the first by order."""
    by_kind: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        by_kind[task.kind].append(task)
    measured = []
    for number, kind in enumerate(sorted(by_kind)):
        share = held_out // len(by_kind) + (number < held_out % len(by_kind))
        measured += first_of(by_kind[kind], share)
    kept_away = {task.images for task in measured}
    return [t for tasks in by_kind.values() for t in tasks if t.images not in kept_away], measured


def balanced(tasks: Iterable[Task], *, at_most: int) -> list[Task]:
    """Return at most so many tasks of each kind, the first by order."""
    by_kind: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        by_kind[task.kind].append(task)
    return [task for kind in sorted(by_kind) for task in first_of(by_kind[kind], at_most)]


def first_of(tasks: Iterable[Task], count: int) -> list[Task]:
    """Return `count` tasks, the first in the order of their digests."""
    return sorted(tasks, key=lambda task: task.order)[:count]


def _kind(edit: Edit) -> str:
    if without_skin_tones(edit.source) == without_skin_tones(edit.target):
        return "tone"
    if edit.instruction in ("make it a woman", "make it a man", "make it a person"):
        return "person"
    return "other"


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode()).digest()


def samples_of(tasks: Iterable[Task], images: dict[str, bytes]) -> Iterator[dict[str, Any]]:
    """Yield each task as a sample of a shard.

    Args:
        tasks: To write.
        images: PNG of each key.

    Yields:
        A sample of each task, with its image.
    """
    for number, task in enumerate(tasks):
        shown = {f"{n}.png": images[key] for n, key in enumerate(task.images)}
        notes = {"kind": task.kind, "images": task.images, "messages": task.messages}
        yield {"__key__": f"{number:07d}", **shown, "json": json.dumps(notes).encode()}
