"""What is trained on, shown once before it starts: what is given, and what is to be learned."""

from __future__ import annotations

import sys
from itertools import groupby, islice
from pathlib import Path
from typing import TextIO

from data_pipelines.shards.stream import SequenceStream
from data_pipelines.sources.source import Source
from mmdlm.core.sequence import Sequence
from mmdlm.core.vocabulary import Modality
from mmdlm.templates.text_codec import TextCodec

FILE = "examples.txt"
OPEN, CLOSE = (
    "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}",
    "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}",
)
GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"
REPEATED = 4  # so many of one token, and it is counted


def show_examples(
    sources: list[Source],
    codec: TextCodec,
    *,
    length: int,
    count: int,
    max_broken: float,
    folder: Path,
    terminal: TextIO = sys.stderr,
) -> None:
    """Show the first documents of each source, on the terminal and in folder/examples.txt.

    Targets are in color where a person looks, and in brackets in the file and in a log.

    Args:
        sources: Of the run.
        codec: The text tokenizer.
        length: Tokens of a row.
        count: Documents of each source.
        max_broken: Share of samples that are passed over.
        folder: Of the run.
        terminal: Where people look.

    Raises:
        ValueError: Where a source has no document that can be used, or too many that cannot.
    """
    shown = [
        (source, sequence)
        for number, source in enumerate(sources)
        for sequence in _first(source, number, codec, length, count, max_broken)
    ]
    text = "".join(_described(source, sequence, codec, OPEN, CLOSE) for source, sequence in shown)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(text, encoding="utf-8")
    if terminal.isatty():
        text = "".join(_described(*one, codec, GREEN, PLAIN) for one in shown)
    print(text, file=terminal, end="", flush=True)


def described(
    sequence: Sequence, codec: TextCodec, *, opened: str = OPEN, closed: str = CLOSE
) -> str:
    """Return a document as text: marks around targets, kind and number for what is no text."""
    tokens = [
        (bool(target), segment.modality, int(i))
        for segment in sequence.segments
        for i, target in zip(segment.ids, segment.target, strict=True)
    ]
    parts = []
    for target, run in groupby(tokens, lambda token: token[0]):
        text = "".join(
            _text([i for _, _, i in alike], modality, codec)
            for modality, alike in groupby(run, lambda token: token[1])
        )
        parts.append(f"{opened}{text}{closed}" if target else text)
    return "".join(parts)


def _first(
    source: Source, number: int, codec: TextCodec, length: int, count: int, max_broken: float
) -> list[Sequence]:
    stream = SequenceStream(
        [source],
        codec.vocabulary,
        tokenizer=codec.tokenizer,
        length=length,
        seed=number,
        repeat=False,
        max_broken=max_broken,
    )
    found = list(islice(stream, count))
    if count and not found:
        raise ValueError(f"{source.urls}: the shards hold no sample that can be used")
    return found


def _described(
    source: Source, sequence: Sequence, codec: TextCodec, opened: str, closed: str
) -> str:
    documents = sequence.documents
    learned = sum(int(segment.target.sum()) for one in documents for segment in one.segments)
    return (
        f"--- {source.urls}: {learned} of {len(sequence)} tokens are learned, those in "
        f"{opened}marks{closed}\n"
        + "".join(f"{described(one, codec, opened=opened, closed=closed)}\n" for one in documents)
    )


def _text(ids: list[int], modality: Modality, codec: TextCodec) -> str:
    if modality == Modality.FEATURE:
        return f"<image: {len(ids)} features>"
    if modality == Modality.IMAGE:
        unknown = "unknown " if set(ids) == {codec.vocabulary.mask_id} else ""
        return f"<image: {len(ids)} {unknown}codes>"
    parts = []
    runs = [(i, len(list(same))) for i, same in groupby(ids)]
    for repeated, group in groupby(runs, lambda run: run[1] >= REPEATED):
        if repeated:
            parts += [f"{_decoded([i], codec)} x {times} " for i, times in group]
        else:
            parts.append(_decoded([i for i, times in group for _ in range(times)], codec))
    return "".join(parts)


def _decoded(ids: list[int], codec: TextCodec) -> str:
    """Ids as text, special tokens by name; those that only the vocabulary knows by their kind."""
    vocabulary, parts = codec.vocabulary, []
    for known, group in groupby(ids, lambda i: vocabulary.text[0] <= i < vocabulary.text[1]):
        run = list(group)
        if known:
            own = [i - vocabulary.text[0] for i in run]
            parts.append(str(codec.tokenizer.decode(own, skip_special_tokens=False)))
        else:
            parts += [_special(i, codec) for i in run]
    return "".join(parts)


def _special(i: int, codec: TextCodec) -> str:
    vocabulary = codec.vocabulary
    names = {
        vocabulary.mask_id: "<mask>",
        vocabulary.pad_id: "<pad>",
        vocabulary.begin_image_id: "<begin image>",
        vocabulary.end_image_id: "<end image>",
    }
    return names.get(i, f"<id {i}>")
