"""One id space for all that a denoiser reads and writes: text, special ids and image codes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor


class Modality(IntEnum):
    """What a position holds. CONTROL is structure (padding, image borders), never a target."""

    CONTROL = 0
    TEXT = 1
    IMAGE = 2
    FEATURE = 3  # a slot that a vision adapter fills; it has no id of its own


GENERATED = (Modality.TEXT, Modality.IMAGE)


@dataclass(frozen=True)
class Vocabulary:
    """The id ranges of a checkpoint; no integer literal stands in for an id anywhere else.

    `text` and `image` are half-open ranges `(start, stop)`; `eos_id` lies inside `text`, so that a
    model can end a text. A text-only vocabulary has an empty `image` range, and no markers for the
    begin and the end of an image.
    """

    size: int
    text: tuple[int, int]
    image: tuple[int, int]
    mask_id: int
    pad_id: int
    eos_id: int
    begin_image_id: int | None = None
    end_image_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("size", "mask_id", "pad_id", "eos_id", "begin_image_id", "end_image_id"):
            value = getattr(self, name)
            optional = name.endswith("image_id") and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"vocabulary: {name} must be a whole number, not {value!r}")
        for name in ("text", "image"):
            ends = getattr(self, name)
            if not isinstance(ends, tuple | list) or [type(one) for one in ends] != [int, int]:
                raise ValueError(f"vocabulary: {name} must be two whole numbers, not {ends!r}")
            start, stop = ends
            if not 0 <= start <= stop <= self.size:
                raise ValueError(
                    f"vocabulary: the {name} range ({start}, {stop}) is not within {self.size} ids"
                )
            object.__setattr__(self, name, (int(start), int(stop)))  # JSON gives lists
        if max(self.text[0], self.image[0]) < min(self.text[1], self.image[1]):
            raise ValueError(f"vocabulary: text {self.text} and image {self.image} ranges overlap")
        for name in ("mask_id", "pad_id", "begin_image_id", "end_image_id"):
            value = getattr(self, name)
            if value is None and name.endswith("image_id") and not self.image_codes:
                continue
            if value is None or not 0 <= value < self.size:
                raise ValueError(f"vocabulary: {name} {value} is not one of {self.size} ids")
        if not self.text[0] <= self.eos_id < self.text[1]:
            raise ValueError(
                f"vocabulary: eos_id {self.eos_id} lies outside the text range {self.text}"
            )

    @classmethod
    def build(cls, *, text_size: int, eos_id: int, image_codes: int = 0) -> Vocabulary:
        """Lay out `text | mask, pad, begin image, end image | image codes`."""
        mask_id, pad_id, begin_image_id, end_image_id = range(text_size, text_size + 4)
        first_code = text_size + 4
        return cls(
            size=first_code + image_codes,
            text=(0, text_size),
            image=(first_code, first_code + image_codes),
            mask_id=mask_id,
            pad_id=pad_id,
            eos_id=eos_id,
            begin_image_id=begin_image_id,
            end_image_id=end_image_id,
        )

    @property
    def image_codes(self) -> int:
        """Number of image codes; zero for a text-only vocabulary."""
        return self.image[1] - self.image[0]

    @property
    def image_markers(self) -> tuple[int, int]:
        """Ids that stand before and after the codes of an image."""
        if self.begin_image_id is None or self.end_image_id is None:
            raise ValueError(
                "the vocabulary has no begin and end of an image; take a model that knows images"
            )
        return self.begin_image_id, self.end_image_id

    def range(self, modality: Modality) -> tuple[int, int]:
        """Half-open id range in which tokens of a generated modality live."""
        if modality == Modality.TEXT:
            return self.text
        if modality == Modality.IMAGE:
            return self.image
        raise ValueError(f"{Modality(modality).name} positions hold no generated ids")

    def image_ids(self, codes: Tensor) -> Tensor:
        """Codes of an image tokenizer, any shape -> ids."""
        return codes + self.image[0]

    def codes(self, ids: Tensor) -> Tensor:
        """Ids -> codes of the image tokenizer; the inverse of `image_ids`."""
        return ids - self.image[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the form that a checkpoint's config stores; `Vocabulary(**d)` reads it."""
        return asdict(self)
