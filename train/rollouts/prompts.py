"""What a policy is asked while it learns: problems from files, shards, or made by a rule."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from data_pipelines.countdown import Style as CountdownStyle
from data_pipelines.countdown import read_countdown
from data_pipelines.countdown import to_problem as countdown_problem
from data_pipelines.shards.shards import BrokenShard, Sample, expand_urls, read_shard
from data_pipelines.sources.local_files import path_inside
from data_pipelines.sources.problems import Problem, Prompt
from data_pipelines.sources.row_files import ROW_FILES, Row, read_rows, whole
from data_pipelines.sources.rows import rows_of
from data_pipelines.sources.text_files import decoded, parsed
from data_pipelines.sources.word_problems import (
    gsm8k_problem,
    math500_problem,
    read_gsm8k,
    read_math500,
)
from data_pipelines.sudoku import Style as SudokuStyle
from data_pipelines.sudoku import read_puzzles
from data_pipelines.sudoku import to_problem as sudoku_problem
from mmdlm.tasks.countdown import make_problems
from mmdlm.tasks.sudoku import make_puzzles


class Prompts(ABC):
    """Where problems come from; YAML names one by class path.

    All problems have the same columns, which rewards ask for by name. The column `images`, where
    there is one, names the images that the prompt is about.
    """

    @abstractmethod
    def problems(self) -> tuple[Problem, ...]:
        """All of them, in an order of their own; ValueError where there are none to be had."""


@dataclass(frozen=True)
class Lines(Prompts):
    """Rows of a file (.jsonl, .json, .csv, .parquet) or of a Hub data set (OWNER/NAME).

    Every column but the prompt's is for the rewards.

    Columns that some rows lack are left out.

    Attributes:
        prompt: Column of the prompt: a text, or messages whose last is the user's.
        chat: The text is a message that is to be answered, not the beginning of one to go on with.
        images: Column of a path, or a list of paths, relative to the file; "" for none.
        split: Of a Hub data set.
        allow_outside: Whether a path of an image may lead out of the folder of the file.
    """

    path: str
    prompt: str = "prompt"
    chat: bool = True
    images: str = ""
    split: str = "train"
    allow_outside: bool = False

    def problems(self) -> tuple[Problem, ...]:
        rows = self._rows()
        shared = set.intersection(*(set(row.values) for row in rows))
        made = []
        for row in rows:
            columns = {name: value for name, value in row.values.items() if name in shared}
            if self.images:
                given = row[self.images]
                given = [given] if isinstance(given, str) else list(given or [])
                columns["images"] = [self._image(one, row) for one in given]
            text = _said(row[self.prompt], row.where)
            columns.pop(self.prompt, None)
            made.append(Problem(row.where, Prompt(text, chat=self.chat), columns))
        return tuple(made)

    def _image(self, name: Any, row: Row) -> str:
        """Return the path of an image that a row names."""
        folder = Path(self.path).parent
        try:
            return str(path_inside(folder, name, allow_outside=self.allow_outside))
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None

    def _rows(self) -> list[Row]:
        if self.path.lower().endswith(ROW_FILES):
            return read_rows(Path(self.path))
        rows = [whole(row) for row in rows_of(self.path, split=self.split)]
        if not rows:
            raise ValueError(f"{self.path} holds no prompts")
        return rows


@dataclass(frozen=True)
class Names(Prompts):
    """Texts of shards, as prompts for images; rewards find them in the column `name`.

    Attributes:
        urls: Shards, see `data_pipelines.shards.shards.expand_urls`.
        field: Of a sample that holds the text.
        held_out: Whether to ask for what is marked `held_out` in the JSON of a sample; None: for
            all.
        matching: A regular expression that is found in the texts asked for; "": any.
        orders: Ask for each text in so many random orders of its words, its own perhaps among them:
            a model that knows a text by heart has to compose it then. 0: as it stands.
        seed: Of these orders.
    """

    urls: str | list[str]
    field: str = "txt"
    held_out: bool | None = False
    matching: str = ""
    orders: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.orders < 0:
            raise ValueError(f"prompts: orders must not be negative, got {self.orders}")
        try:
            re.compile(self.matching)
        except re.error as error:
            raise ValueError(
                f"prompts: matching {self.matching!r} is no regular expression ({error})"
            ) from error

    def problems(self) -> tuple[Problem, ...]:
        samples = [one for url in expand_urls(self.urls) for one in _samples(url)]
        texts = [self._text(one) for one in samples if self._is_wanted(one)]
        texts = [one for one in texts if re.search(self.matching, one)]
        if not texts:
            raise ValueError(f"prompts: no sample of {self.urls} is to be asked for; name others")
        return tuple(
            Problem(asked, Prompt(asked, chat=False), {"name": text})
            for text in texts
            for asked in self._asked(text)
        )

    def _asked(self, text: str) -> list[str]:
        """Return the instructions of a text, each once."""
        if not self.orders:
            return [text]
        draw = random.Random(f"{self.seed} {text}")
        words = text.split()
        orders = (" ".join(draw.sample(words, len(words))) for _ in range(self.orders))
        return list(dict.fromkeys(orders))

    def _text(self, sample: Sample) -> str:
        if self.field not in sample:
            raise ValueError(
                f"prompts: sample {sample['__key__']} of {sample['__url__']} has no field "
                f"{self.field!r}; name another"
            )
        return decoded(sample[self.field]).strip()

    def _is_wanted(self, sample: Sample) -> bool:
        if self.held_out is None or "json" not in sample:
            return True
        return bool(parsed(sample["json"]).get("held_out", False)) == self.held_out


@dataclass(frozen=True)
class Sudoku(Prompts):
    """4x4 puzzles of the training grids, made by the seed; or those of a csv."""

    count: int = 10_000
    blanks: tuple[int, int] = (8, 8)
    style: SudokuStyle = "d1"
    path: Path | None = None
    seed: int = 0

    def problems(self) -> tuple[Problem, ...]:
        if self.path is not None:
            puzzles = read_puzzles(self.path)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            puzzles = make_puzzles(
                self.count, split="train", blanks=self.blanks, generator=generator
            )
        return tuple(sudoku_problem(one, style=self.style) for one in puzzles)


@dataclass(frozen=True)
class Countdown(Prompts):
    """Countdown problems of the training split, made by the seed; or those of a jsonl.

    Attributes:
        limits: Largest number, least and largest target of problems that are made.
    """

    count: int = 10_000
    numbers: int = 3
    limits: tuple[int, int, int] = (100, 10, 100)
    style: CountdownStyle = "d1_train"
    path: Path | None = None
    seed: int = 0

    def problems(self) -> tuple[Problem, ...]:
        if self.path is not None:
            found = read_countdown(self.path)
        else:
            largest, least, most = self.limits
            found = make_problems(
                self.count,
                split="train",
                numbers=self.numbers,
                largest=largest,
                targets=(least, most),
                generator=torch.Generator().manual_seed(self.seed),
            )
        return tuple(countdown_problem(one, style=self.style) for one in found)


@dataclass(frozen=True)
class WordProblems(Prompts):
    """GSM8K (`question`, `answer`) or MATH (`problem`, `answer` or `solution`), from a jsonl."""

    path: Path
    form: Literal["gsm8k", "math"] = "gsm8k"
    style: Literal["d1", "d1_train", "llada"] = "d1_train"

    def problems(self) -> tuple[Problem, ...]:
        if self.form == "gsm8k":
            return tuple(gsm8k_problem(row, style=self.style) for row in read_gsm8k(self.path))
        return tuple(math500_problem(row, style=self.style) for row in read_math500(self.path))


def _samples(url: str) -> list[Sample]:
    try:
        return list(read_shard(url))
    except BrokenShard as error:
        raise ValueError(f"prompts: shard {url}: {error}; write it again") from error


def _said(prompt: Any, where: str) -> str:
    """Return a prompt that is a text, or the content of its only message."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], Mapping):
        prompt = prompt[0].get("content")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f"{where}: the prompt is {prompt!r}; give it a text, or one message of the user"
        )
    return prompt
