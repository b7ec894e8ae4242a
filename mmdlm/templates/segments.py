"""Turn the pieces of a prompt into segments: special ids, text and images in reading order."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from mmdlm.core.sequence import (
    Segment,
    Sequence,
    control_segment,
    image_segment,
    text_segment,
)
from mmdlm.core.vocabulary import Modality
from mmdlm.templates.task_prompt import (
    Codes,
    ImageInput,
    TaskPrompt,
    answer_segment,
    without_prompt,
)
from mmdlm.templates.text_codec import TextCodec

Piece = int | str | ImageInput  # the id of a special token, text, an image


def segments_of(codec: TextCodec, pieces: Iterable[Piece]) -> tuple[Segment, ...]:
    """Turn pieces into segments of context.

    Neighboring texts are tokenized as one, as the whole string of a template would be; names of
    special tokens in them are letters.
    """
    return learned_segments(codec, ((piece, False) for piece in pieces))


def learned_segments(codec: TextCodec, pieces: Iterable[tuple[Piece, bool]]) -> tuple[Segment, ...]:
    """Turn pieces, each with whether it is learned, into segments, of which those are targets.

    Where learning begins and ends, the text of a prompt does too, so that it is tokenized apart.
    """
    segments: list[Segment] = []
    kinds = groupby(pieces, lambda one: (isinstance(one[0], int | str), one[1]))
    for (is_text, learned), group in kinds:
        if not is_text:
            for image, _ in group:
                segments += image_segments(codec, image)
        elif ids := [i for piece in _joined(one for one, _ in group) for i in _ids(codec, piece)]:
            segments.append(text_segment(ids, target=learned))
    return tuple(segments)


def image_segments(
    codec: TextCodec, image: Piece, *, markers: tuple[int, int] | None = None
) -> tuple[Segment, ...]:
    """Lay out an image as context or target: slots of its features, or codes between markers.

    Args:
        codec: The text tokenizer.
        image: To lay out.
        markers: Begin and end of an image; default: those of the vocabulary.

    Returns:
        The segments, markers included.
    """
    assert not isinstance(image, int | str)
    if not isinstance(image, Codes):
        return (image_segment(image, codec.vocabulary),)
    begin, end = map(control_segment, markers or codec.vocabulary.image_markers)
    return begin, Segment(Modality.IMAGE, image.ids, image.open), end


def answering(codec: TextCodec, prompt: tuple[Segment, ...], *, length: int) -> TaskPrompt:
    """Lay out a prompt and an answer to be generated; the other branch lacks the prompt."""
    sequence = Sequence((*prompt, answer_segment(codec, length)))
    return TaskPrompt(sequence, (without_prompt(sequence, codec),), output_segments=(len(prompt),))


def continued(prompt: TaskPrompt, begun: list[int]) -> TaskPrompt:
    """Return a task prompt whose result begins with ids that are given; they are not part of it."""
    first = prompt.output_segments[0]
    segments = prompt.sequence.segments
    sequence = Sequence((*segments[:first], text_segment(begun), *segments[first:]))
    return TaskPrompt(
        sequence, prompt.unconditional, tuple(number + 1 for number in prompt.output_segments)
    )


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Join neighboring texts."""
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return joined


def _ids(codec: TextCodec, piece: Piece) -> list[int]:
    assert isinstance(piece, int | str)
    return [piece] if isinstance(piece, int) else codec.encode(piece)
