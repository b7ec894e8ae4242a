"""Documents with images between their texts, all of them target, for pretraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from data_pipelines.shards.shards import Sample
from data_pipelines.sources.conversations import CODES
from data_pipelines.sources.source import LONGEST_TOKEN, TextTokenizer, field_codes, letters_of
from data_pipelines.sources.text_files import parsed
from data_pipelines.sources.vision_samples import IMAGE_FIELD, Seeing, numbered
from mmdlm.core.sequence import (
    Segment,
    Sequence,
    image_segment,
    image_segments,
    text_segment,
)
from mmdlm.core.vocabulary import Modality, Vocabulary
from mmdlm.vision.encoders.crops import CropViews

Unit = tuple[Segment, ...]  # a text, or an image with its markers: an image is never cut


@dataclass(frozen=True)
class Interleaved(Seeing):
    """A document in reading order: texts are targets, images too where they are codes.

    The JSON has {"content": [{"type": "text", "text"}, {"type": "image"}]}, as
    `data_pipelines.write_shards interleaved` writes it; the images are 0.codes.npy, 1.codes.npy ...
    (`data_pipelines.tokenize_images`), or are looked at through the vision adapter of the model,
    and are context then.

    Attributes:
        max_tokens: Of a document: a longer one gives a part that begins at a text or image, drawn
            at random; a text is cut where the tokens end, an image that does not fit ends it.
        learn_images: Whether codes of images are targets; false: only texts are.
        separator: Text between two texts that follow each other.
        field: Of the sample that holds the JSON.
    """

    max_tokens: int
    learn_images: bool = True
    separator: str = "\n\n"
    field: str = "json"

    needs_eyes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; at least 1 is needed")

    def sequence(
        self,
        sample: Sample,
        views: list[CropViews],
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Sequence:
        """See `Seeing.sequence`."""
        pieces = self._pieces(sample)
        images = self._images(sample, views, vocabulary)
        count = sum(piece is None for piece in pieces)
        if count != len(images):
            raise ValueError(f"its content has {count} images, but there are {len(images)}")
        rest = iter(images)
        units = [
            next(rest) if piece is None else self._text(piece, tokenizer=tokenizer)
            for piece in pieces
        ]
        if sum(map(_tokens, units)) < self.max_tokens:
            return self._part(units, vocabulary)
        parts = (self._part(units[start:], vocabulary) for start in range(len(units)))
        useful = [part for part in parts if any(bool(one.target.any()) for one in part.segments)]
        if not useful:
            raise ValueError(
                f"no part of it with something to learn fits in max_tokens, {self.max_tokens}; "
                "raise it"
            )
        return useful[int(torch.randint(len(useful), (), generator=generator))]

    def _pieces(self, sample: Sample) -> list[str | None]:
        """Return the texts of a document, and None for each image."""
        if self.field not in sample:
            raise ValueError(f"no {self.field!r} among its fields")
        content: Any = parsed(sample[self.field])
        given = content.get("content") if isinstance(content, dict) else None
        if not isinstance(given, list) or not given:
            raise ValueError("its JSON has no content; `write_shards interleaved` writes it")
        found: list[str | None] = []
        for piece in given:
            match piece:
                case {"type": "text", "text": str(text)}:
                    is_text_before = bool(found) and found[-1] is not None
                    found.append(f"{self.separator}{text}" if is_text_before else text)
                case {"type": "image"}:
                    found.append(None)
                case _:
                    raise ValueError(f"a piece of its content is neither text nor image: {piece!r}")
        return found

    def _images(self, sample: Sample, views: list[CropViews], vocabulary: Vocabulary) -> list[Unit]:
        if views:
            return [(image_segment(one, vocabulary),) for one in views]
        codes = numbered(sample, CODES)
        if not codes and (found := numbered(sample, IMAGE_FIELD)):
            raise ValueError(
                f"it has images ({', '.join(found)}), but no codes of them; "
                "data_pipelines.tokenize_images adds them"
            )
        return [
            image_segments(
                field_codes(sample, vocabulary, field=name), vocabulary, target=self.learn_images
            )
            for name in codes
        ]

    def _text(self, text: str, *, tokenizer: TextTokenizer) -> Unit:
        """Return a text as targets; of one that no row holds, a token more than it may have."""
        longest = LONGEST_TOKEN * (self.max_tokens + 1)  # characters
        ids = letters_of(text[:longest], tokenizer)
        return (text_segment(ids[: self.max_tokens + 1], target=True),) if ids else ()

    def _part(self, units: list[Unit], vocabulary: Vocabulary) -> Sequence:
        """Return as much of a document as the tokens hold; its end is closed by eos."""
        segments: list[Segment] = []
        room = self.max_tokens
        for unit in units:
            if (size := _tokens(unit)) > room:
                if len(unit) == 1 and unit[0].modality == Modality.TEXT and room:
                    segments.append(text_segment(unit[0].ids[:room], target=True))
                return Sequence(tuple(segments))
            segments += unit
            room -= size
        if room:
            segments.append(text_segment([vocabulary.eos_id], target=True))
        return Sequence(tuple(segments))


def _tokens(unit: Unit) -> int:
    return sum(len(segment.ids) for segment in unit)
