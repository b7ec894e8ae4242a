"""Plain text: JSON lines into samples, and samples into documents that are all target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from data_pipelines.jobs.report import Report
from data_pipelines.shards.shards import Sample
from data_pipelines.sources.row_files import BrokenRow, Row
from data_pipelines.sources.source import (
    LONGEST_TOKEN,
    TextTokenizer,
    ToSequence,
    field_text,
    letters_of,
)
from data_pipelines.sources.text_files import as_json, json_bytes
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


def text_samples(
    rows: Iterable[Row | BrokenRow], *, source: str, report: Report, field: str = "text"
) -> Iterator[Sample]:
    """Yield rows as samples: txt is their `field`, json the whole row.

    A row that lacks the field is counted in the report, and so is one that JSON does not hold.

    Raises ValueError: there are no rows, or too many of them are broken.
    """
    for number, row in enumerate(rows, start=1):
        report.read += 1
        if isinstance(row, BrokenRow):
            report.add_broken(row.where, row.reason)
            continue
        text = row.values.get(field)
        if not isinstance(text, str):
            report.add_broken(row.where, f"no text in {field!r}; name another field")
            continue
        content, unread = as_json(row.values)
        for name in unread:
            report.unused[name] = report.unused.get(name, 0) + 1
        yield {"__key__": f"{number:09d}", "txt": text.encode(), "json": json_bytes(content)}
    if not report.read:
        raise ValueError(f"{source} is empty")
