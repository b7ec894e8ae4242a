"""How long the documents of sources are: laid out as the model reads them, each at its longest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from transformers import PreTrainedTokenizerFast

from data_pipelines.shards.sample_stats import BrokenSample, one_line
from data_pipelines.shards.shards import Sample
from data_pipelines.shards.stream import ShardStream
from data_pipelines.sources.conversations import Conversation
from data_pipelines.sources.image_text import ImageText, expect_codes
from data_pipelines.sources.source import (
    BROKEN_CONTENT,
    LONGEST_TOKEN,
    Source,
    ToSequence,
    field_value,
)
from data_pipelines.sources.vision_samples import SeenCaption, attach_vision
from data_pipelines.text_tokenizer import token_counts
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.auto import PretrainedDenoiser
from mmdlm.templates.infill import check_whole, shortened
from mmdlm.vision.tokenizers.base import ImageTokenizer
from train.stages.denoising import Data

LOOKED_AT, LOOKED_BYTES = 10_000, 1 << 23  # documents of a source, and bytes of their fields
LONGEST = 512  # tokens of a text up to which all of it is counted


@dataclass(frozen=True)
class Measured:
    """Lengths of the documents of a source that were laid out.

    Attributes:
        name: Of the source among the settings.
        slots: Text slots as given; None: not given.
        has_slots: Whether its texts fill a fixed number of slots.
        cut: Whether texts are cut that need more.
        texts: Tokens of each text with its end.
        longest: Which text is the longest, for an error.
        beside: Tokens of each document, but for its text slots.
        is_whole: Whether all documents of the source were laid out.
    """

    name: str
    slots: int | None
    has_slots: bool
    cut: bool
    texts: tuple[int, ...]
    longest: str
    beside: tuple[int, ...]
    is_whole: bool

    def lengths(self, text_slots: int | None) -> list[int]:
        """Return the tokens of each document, where the source leaves its slots out."""
        slots = self.slots or text_slots or 0 if self.has_slots else 0
        return [tokens + slots for tokens in self.beside]


def measure(
    data: Data,
    denoiser: PretrainedDenoiser,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageTokenizer | None,
) -> tuple[Measured, ...]:
    """Lay out documents of each source; of conversations none, which rows of a length cut."""
    sources = [replace(one, to_sequence=_at_its_longest(one.to_sequence)) for one in data.sources]
    if images is not None:
        edge = images.image_size // images.downsampling
        sources = expect_codes(sources, edge**2)
    laid_out = attach_vision(
        [one for one in sources if not isinstance(one.to_sequence, Conversation)],
        getattr(denoiser, "vision", None),
    )
    rest = iter(laid_out)
    return tuple(
        Measured(f"data.sources.{number}", None, False, False, (), "", (), is_whole=True)
        if isinstance(source.to_sequence, Conversation)
        else _measured(number, source, next(rest), denoiser.vocabulary, tokenizer)
        for number, source in enumerate(data.sources)
    )


def _at_its_longest(to_sequence: ToSequence) -> ToSequence:
    """Return what makes the longest documents of samples, with a single text slot."""
    if isinstance(to_sequence, ImageText):
        tasks = to_sequence.tasks
        if tasks.draw + tasks.caption + tasks.joint > 0:
            to_sequence = replace(to_sequence, tasks=replace(tasks, text=0.0))
    if isinstance(to_sequence, ImageText | SeenCaption):
        return replace(to_sequence, text_slots=1, cut_long_text=True)
    return to_sequence


def _measured(
    number: int,
    source: Source,
    laid_out: Source,
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerFast,
) -> Measured:
    """Lay out documents of one source.

    Args:
        number: Of the source.
        source: As it is given.
        laid_out: The same at its longest, through the eye of the model.
        vocabulary: Of the model.
        tokenizer: Of the texts.

    Raises:
        ValueError: Where none of the documents can be used.
    """
    samples, is_whole = _first_samples(laid_out)
    generator, beside, reason = torch.Generator(), [], "the shards are empty"
    given = source.to_sequence
    has_slots = isinstance(given, ImageText | SeenCaption)
    for sample in samples:
        try:
            document = laid_out.to_sequence(
                sample, vocabulary, tokenizer=tokenizer, generator=generator.manual_seed(0)
            )
        except BROKEN_CONTENT as error:  # the loader counts and names them
            reason = one_line(error)
            continue
        beside.append(max(map(len, document.documents)) - has_slots)
    if not beside:
        raise ValueError(
            f"{source.urls}: none of {len(samples)} documents can be used; the last: {reason}"
        )
    if not isinstance(given, ImageText | SeenCaption):
        name = f"data.sources.{number}"
        return Measured(name, None, False, False, (), "", tuple(beside), is_whole)
    longest = LONGEST_TOKEN * max(LONGEST, given.text_slots or 0)  # characters
    texts = [
        (text[:longest], key) for sample in samples for text, key in _texts(sample, given.text)
    ]
    counts = [1 + count for count in token_counts(tokenizer, [text for text, _ in texts])]
    text, key = max(zip(counts, texts, strict=True), default=(0, ("", "")), key=itemgetter(0))[1]
    return Measured(
        name=f"data.sources.{number}",
        slots=given.text_slots,
        has_slots=True,
        cut=given.cut_long_text,
        texts=tuple(counts),
        longest=f"{key}: {shortened(text)!r}",
        beside=tuple(beside),
        is_whole=is_whole,
    )


def _first_samples(source: Source) -> tuple[list[Sample], bool]:
    """Return samples of shards in a random order, which is always the same, and if they are all."""
    stream = ShardStream(
        source.shards(), repeat=False, shuffle_buffer=1, fields=source.to_sequence.fields
    )
    samples: list[Sample] = []
    size = 0
    for item in stream:
        if isinstance(item, BrokenSample):
            continue
        if len(samples) == LOOKED_AT or size > LOOKED_BYTES:
            return samples, False
        samples.append(item)
        size += sum(map(len, item.values()))
    return samples, True


def _texts(sample: Sample, field: str) -> Iterator[tuple[str, str]]:
    """Yield the texts that a sample may give, each with the sample's name; none for a bad one."""
    try:
        value = field_value(sample, field)
        for text in value if isinstance(value, list) else [value]:
            check_whole(text)
            yield text, str(sample["__key__"])
    except (*BROKEN_CONTENT, AttributeError):  # the loader counts and names it
        return
