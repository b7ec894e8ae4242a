"""Plain text: JSON lines into samples, and samples into documents that are all target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipelines.jobs.report import Report
from data_pipelines.shards.shards import Sample
from data_pipelines.sources.row_files import BrokenRow, rows_in
from data_pipelines.sources.source import (
    LONGEST_TOKEN,
    TextTokenizer,
    ToSequence,
    field_text,
    letters_of,
)
from data_pipelines.sources.text_files import json_bytes
from mmdlm.core.sequence import Sequence, text_segment
from mmdlm.core.vocabulary import Vocabulary

LONG_TEXT = 1 << 18  # characters; of texts up to here all is tokenized


@dataclass(frozen=True)
class Text(ToSequence):
    """A text and its closing eos, all of it target.

    Attributes:
        max_tokens: A longer text gives a window of so many tokens, from a random place, so that all
            of it is seen over the epochs; of a very long one, a part is tokenized.
        text: Field of the text: "txt", or a place in a JSON field such as "json.text".
    """

    max_tokens: int
    text: str = "txt"

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; at least 1 is needed")

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.text.split(".")[0],)

    def teaches(self, samples: Iterable[Sample]) -> frozenset[str]:
        """Return the tasks of texts."""
        return frozenset({"infill", "complete"})

    def __call__(
        self,
        sample: Sample,
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Sequence:
        text = field_text(sample, self.text, generator=generator)
        longest = LONGEST_TOKEN * self.max_tokens + LONG_TEXT  # characters that are tokenized
        if len(text) > longest:
            start = int(torch.randint(len(text) - longest + 1, (), generator=generator))
            text = text[start : start + longest]
        ids = [*letters_of(text, tokenizer), vocabulary.eos_id]
        spare = len(ids) - self.max_tokens
        if spare > 0:
            start = int(torch.randint(spare + 1, (), generator=generator))
            ids = ids[start : start + self.max_tokens]
        return Sequence((text_segment(ids, target=True),))


def jsonl_samples(path: Path, *, report: Report, field: str = "text") -> Iterator[Sample]:
    """Lines of JSON objects -> samples: txt is their `field`, json the whole object.

    A line that is no object or lacks the field is counted in the report.
    """
    for number, row in enumerate(rows_in(path, ".jsonl"), start=1):
        report.read += 1
        if isinstance(row, BrokenRow):
            report.add_broken(row.where, row.reason)
            continue
        text = row.values.get(field)
        if not isinstance(text, str):
            report.add_broken(row.where, f"no text in {field!r}; name another field")
            continue
        yield {"__key__": f"{number:09d}", "txt": text.encode(), "json": json_bytes(row.values)}


def count_lines(path: Path) -> int:
    """Lines of a file; ValueError where there is no such file."""
    if not path.is_file():
        raise ValueError(f"text file {path}: no such file")
    with open(path, "rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
