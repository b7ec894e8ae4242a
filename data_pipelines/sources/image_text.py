"""Images, as codes, with texts: drawing, captioning, both at once, or only the text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from data_pipelines.shards.shards import Sample
from data_pipelines.sources.source import (
    LONGEST_TOKEN,
    Source,
    TextTokenizer,
    ToSequence,
    field_codes,
    field_text,
    letters_of,
)
from mmdlm.core.sequence import Segment, Sequence, image_segments, text_segment
from mmdlm.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class Tasks:
    """How often, relative to each other, a sample becomes each task.

    Attributes:
        draw: text -> image.
        caption: image -> text.
        joint: Both are targets.
        text: Only the text, without an image.
    """

    draw: float = 1.0
    caption: float = 1.0
    joint: float = 0.0
    text: float = 0.0

    def __post_init__(self) -> None:
        if min(astuple(self)) < 0 or sum(astuple(self)) <= 0:
            raise ValueError(f"tasks {self}: weights are not negative, and one is positive")

    def choose(self, *, generator: torch.Generator) -> str:
        """Draw the name of one task, by weight."""
        weights = {"draw": self.draw, "caption": self.caption, "joint": self.joint}
        drawn = float(torch.rand((), generator=generator, dtype=torch.float64))
        drawn *= sum(weights.values()) + self.text
        for task, weight in weights.items():
            drawn -= weight
            if drawn < 0:
                return task
        return "text"


@dataclass(frozen=True)
class ImageText(ToSequence):
    """`begin image, codes, end image, text_slots tokens of text`; the text is closed by eos.

    The image comes first, so that codes keep their positions whatever the text, and the text
    fills a fixed number of slots (its tokens, then eos to the end), so that a captioning model
    decides itself where a text ends. An empty text is all eos.

    Attributes:
        tasks: Which of the two is target.
        text_slots: Tokens of text, the closing eos included; None: `train.pretrain` computes it
            from the data.
        drop_condition: Share of drawing and captioning samples whose context is masked, as
            `Batch.without_context` masks it for classifier-free guidance.
        text: Field of the text: "txt", or a place in a JSON field such as "json.names.de".
        codes: Field of the codes.
        codes_per_image: Of every image; None: as the image tokenizer of the model makes them, where
            that is known.
        cut_long_text: Cut a text that needs more than text_slots; otherwise such a sample counts as
            broken and is skipped.
    """

    tasks: Tasks = Tasks()
    text_slots: int | None = None
    drop_condition: float = 0.1
    text: str = "txt"
    codes: str = "codes.npy"
    codes_per_image: int | None = None
    cut_long_text: bool = False

    def __post_init__(self) -> None:
        check_slots(self.text_slots)
        if not 0 <= self.drop_condition <= 1:
            raise ValueError(f"drop_condition is {self.drop_condition}; a share lies in [0, 1]")

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.text.split(".")[0], self.codes)

    def teaches(self, samples: Iterable[Sample]) -> frozenset[str]:
        """Return what the shares of the tasks say; where texts are targets, holes in them are."""
        shares = self.tasks
        found = {"caption"} if shares.caption or shares.joint else set()
        if found or shares.text:
            found |= {"infill", "complete"}
        if shares.draw or shares.joint:
            found |= {"text_to_image", "inpaint"}
        return frozenset(found)

    def __call__(
        self,
        sample: Sample,
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Sequence:
        task = self.tasks.choose(generator=generator)
        text = text_segment(
            self.text_ids(sample, vocabulary, tokenizer=tokenizer, generator=generator),
            target=task != "draw",
        )
        if task == "text":
            return Sequence((text,))
        codes = field_codes(sample, vocabulary, field=self.codes, count=self.codes_per_image)
        begin, image, end = image_segments(codes, vocabulary, target=task != "caption")
        if task != "joint" and float(torch.rand((), generator=generator)) < self.drop_condition:
            text, image = masked_context(text, vocabulary), masked_context(image, vocabulary)
        return Sequence((begin, image, end, text))

    def text_ids(
        self,
        sample: Sample,
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the text of a sample as [text_slots] ids, closed and filled up by eos."""
        text = field_text(sample, self.text, generator=generator)
        return slots_of(
            text,
            self.text_slots,
            vocabulary=vocabulary,
            tokenizer=tokenizer,
            cut_long_text=self.cut_long_text,
        )


def expect_codes(sources: Iterable[Source], count: int) -> list[Source]:
    """Return the sources, of which those of images refuse another number of codes.

    A source that says its own number keeps it.

    Args:
        sources: Of any kind.
        count: Codes of an image of the model.

    Returns:
        As many sources, in the same order.
    """
    return [
        replace(source, to_sequence=replace(source.to_sequence, codes_per_image=count))
        if isinstance(source.to_sequence, ImageText) and source.to_sequence.codes_per_image is None
        else source
        for source in sources
    ]


def check_slots(text_slots: int | None) -> None:
    """Raise ValueError for fewer text slots than one; None, which is not known yet, passes."""
    if text_slots is not None and text_slots < 1:
        raise ValueError(f"text_slots is {text_slots}; at least 1 is needed for eos")


def slots_of(
    text: str,
    text_slots: int | None,
    *,
    vocabulary: Vocabulary,
    tokenizer: TextTokenizer,
    cut_long_text: bool,
) -> Tensor:
    """Return a text as [text_slots] ids, closed and filled up by eos.

    Raises ValueError for a text that needs more, unless it may be cut.
    """
    if text_slots is None:
        raise ValueError("text_slots is null, which only train.pretrain computes; give a number")
    longest = LONGEST_TOKEN * text_slots  # characters; of a longer text no more is tokenized
    ids = letters_of(text[:longest], tokenizer)
    if len(ids) >= text_slots or len(text) > longest:
        if not cut_long_text:
            least = "at least " if len(text) > longest else ""
            raise ValueError(
                f"its text needs {least}{max(len(ids), text_slots)} tokens and eos but text_slots "
                f"is {text_slots} ({text[:60]!r}); raise text_slots or set cut_long_text"
            )
        ids = ids[:text_slots]
    return torch.tensor([*ids, *[vocabulary.eos_id] * (text_slots - len(ids))])


def masked_context(segment: Segment, vocabulary: Vocabulary) -> Segment:
    """Return a segment whose context tokens are mask ids; targets stay."""
    return replace(segment, ids=segment.ids.masked_fill(~segment.target, vocabulary.mask_id))
