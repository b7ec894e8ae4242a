"""Plain text: JSON lines into samples, and samples into documents that are all target."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipelines.shards import Sample
from data_pipelines.source import TextTokenizer, ToSequence, field_text
from mmdlm.core.sequence import Sequence, text_segment
from mmdlm.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class Text(ToSequence):
    """A text and its closing eos, all of it target.

    max_tokens  a longer text gives a window of so many tokens, from a random place, so that all
                of it is seen over the epochs
    text        field of the text: "txt", or a place in a JSON field such as "json.text"
    """

    max_tokens: int
    text: str = "txt"

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; at least 1 is needed")

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.text.split(".")[0],)

    def __call__(
        self,
        sample: Sample,
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Sequence:
        text = field_text(sample, self.text, generator=generator)
        ids = [*tokenizer.encode(text, add_special_tokens=False), vocabulary.eos_id]
        spare = len(ids) - self.max_tokens
        if spare > 0:
            start = int(torch.randint(spare + 1, (), generator=generator))
            ids = ids[start : start + self.max_tokens]
        return Sequence((text_segment(ids, target=True),))


def jsonl_samples(path: Path, *, field: str = "text") -> Iterator[Sample]:
    """Lines of JSON objects -> samples: txt is their `field`, json the whole object.

    Raises ValueError, with the line, for a line that is no object or lacks the field.
    """
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
            if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
                raise ValueError(f"{path}, line {number}: no text in {field!r}; name another field")
            yield {
                "__key__": f"{number:09d}",
                "txt": entry[field].encode(),
                "json": line.strip().encode(),
            }


def count_lines(path: Path) -> int:
    """Lines of a file; ValueError where there is no such file."""
    if not path.is_file():
        raise ValueError(f"text file {path}: no such file")
    with open(path, "rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
