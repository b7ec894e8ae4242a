"""Problems with an answer that can be checked: how they are asked.

A problem is a prompt and the columns that rewards ask for (`mmdlm.rl.rewards`). Training and
evaluation make the same problems from the same files by the same words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_pipelines.sources.row_files import Row

D1_FORM = """
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""
"""What d1's training prompts begin with. Published prompts are kept to the letter, slips and all:
scores depend on them. Source: arXiv:2504.12216 and its published code."""
D1_BEGUN = "<reasoning>"  # what its evaluation writes at the start of each answer


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        text: A message that is to be answered, or the beginning of a text that is to go on.
        chat: Which of the two.
        begun: What the answer to a message begins with, already written.
        lead: What belongs before the completion when it is scored: the head of a function.
        stop: Texts that end a completion.
    """

    text: str
    chat: bool = True
    begun: str = ""
    lead: str = ""
    stop: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a conversation of one turn."""
        return [{"role": "user", "content": self.text}]

    def whole(self, completion: str) -> str:
        """Return the text that is scored."""
        places = [completion.find(one) for one in self.stop]
        end = min([place for place in places if place >= 0], default=len(completion))
        return self.lead + self.begun + completion[:end]


@dataclass(frozen=True)
class Problem:
    """A prompt, and what is known of its answer: one value for each column."""

    name: str
    prompt: Prompt
    columns: Mapping[str, Any]


def columns_of(problems: Sequence[Problem]) -> dict[str, list[Any]]:
    """Return the columns of problems, as rewards take them."""
    names = list(problems[0].columns) if problems else []
    return {name: [one.columns[name] for one in problems] for name in names}


# ---- examples before a question ------------------------------------------------------------------


def drawn(rows: Sequence[Row], count: int, *, generator: torch.Generator) -> list[Row]:
    """`count` of the rows at random, in random order; ValueError where there are not as many."""
    if count > len(rows):
        raise ValueError(f"{count} examples are asked for, but the file has {len(rows)}; ask fewer")
    order = torch.randperm(len(rows), generator=generator)[:count]
    return [rows[int(i)] for i in order]


def d1_message(system: str, question: str, examples: Iterable[tuple[str, str]] = ()) -> str:
    """d1's message of the user: instructions, examples with their answers, and the question."""
    shown = [f"Question: {asked}\nAnswer:\n{answer}" for asked, answer in examples]
    if shown:
        question = "\n\n".join(shown) + f"\n\nQuestion: {question}\nAnswer:\n"
    return f"{system}\n\n{question}"
