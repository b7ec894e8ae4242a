"""Problems with an answer that can be checked: how they are asked, and read from files.

A problem is a prompt and the columns that rewards ask for (`mmdlm.rl.rewards`). Training and
evaluation make the same problems from the same files by the same words.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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

    text   a message that is to be answered, or the beginning of a text that is to go on
    chat   which of the two
    begun  what the answer to a message begins with, already written
    lead   what belongs before the completion when it is scored: the head of a function
    stop   texts that end a completion
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
        """The text that is scored."""
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
    """The columns of many, as rewards take them."""
    names = list(problems[0].columns) if problems else []
    return {name: [one.columns[name] for one in problems] for name in names}


# ---- files ---------------------------------------------------------------------------------------


LONGEST_FIELD = 1 << 26  # characters of a field of a csv: long reasoning is longer than its usual


@dataclass(frozen=True)
class Row:
    """One line of a file, and where it stands."""

    values: Mapping[str, Any]
    where: str

    def __getitem__(self, column: str) -> Any:
        if column not in self.values:
            had = ", ".join(map(str, self.values)) or "nothing"
            raise ValueError(f"{self.where} has no {column!r} (it has {had})")
        return self.values[column]

    def get(self, *columns: str, default: Any = None) -> Any:
        """The first of the columns that is there and not empty."""
        found = (self.values.get(one) for one in columns)
        return next((one for one in found if one not in (None, "")), default)


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl (one object a line), .json (a list of them) or .csv file (with heads).

    Raises ValueError that names the file, and the line where there is one, for anything else.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".csv":
                rows = _csv_rows(path, file)
            elif path.suffix == ".jsonl":
                rows = [
                    _row(path, n, _parsed(path, n, line))
                    for n, line in enumerate(file, 1)
                    if line.strip()
                ]
            elif path.suffix == ".json":
                found = _parsed(path, 1, file.read())
                if not isinstance(found, list):
                    raise ValueError(f"{path} is no list of objects; give one, or .jsonl")
                rows = [_row(path, n, one) for n, one in enumerate(found, 1)]
            else:
                raise ValueError(f"{path} is not .jsonl, .json or .csv; write it as one of these")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 (byte {error.start})") from error
    except csv.Error as error:
        raise ValueError(f"{path} is no csv that can be read ({error}); try .jsonl") from error
    if not rows:
        raise ValueError(f"{path} holds no problems")
    return rows


def _csv_rows(path: Path, lines: Iterable[str]) -> list[Row]:
    rows = []
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(lines)
    heads = list(reader.fieldnames or ())
    if twice := [one for one in heads if heads.count(one) > 1]:
        raise ValueError(f"{path} has the column {twice[0]!r} twice; rename one of them")
    for number, values in enumerate(reader, 1):
        if None in values or None in values.values():
            raise ValueError(f"{path}, row {number} has more or fewer fields than the first line")
        rows.append(Row(values, f"{path}, row {number}"))
    return rows


def _parsed(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is no JSON ({error})") from error


def _row(path: Path, number: int, values: Any) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{path}, line {number} is no object but {type(values).__name__}")
    return Row(values, f"{path}, line {number}")


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
