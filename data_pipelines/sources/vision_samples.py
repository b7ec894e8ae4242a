"""Images that a model sees through its vision adapter: from the fields of a sample to views.

A sample holds one image ("jpg") or several, numbered in their order ("0.jpg", "1.png" ...), or in
their place what the tower made of them (`data_pipelines.extract_features`).
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from data_pipelines.shards.shards import BrokenShard, Sample, read_shard
from data_pipelines.sources.image_text import check_slots, slots_of
from data_pipelines.sources.source import (
    IMAGES,
    Source,
    TextTokenizer,
    ToSequence,
    encode_array,
    field_names,
    field_text,
    read_array,
)
from data_pipelines.sources.text_files import parsed
from mmdlm.core.sequence import Sequence, image_segment, text_segment
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.vision.encoders.adapter import VisionAdapter
from mmdlm.vision.encoders.crops import CropViews, FeatureLayout
from mmdlm.vision.encoders.tiling import Tiling
from mmdlm.vision.image_files import MAX_PIXELS, open_image

FEATURES = "features.npy"  # of one image; with its number in front where there are several
LAYOUTS = "features.json"  # of all images of a sample, and the fingerprint of the tower
IMAGE_FIELD = re.compile(rf"(?:(\d+)\.)?(?:{'|'.join(IMAGES)})")
FEATURE_FIELD = re.compile(rf"(?:(\d+)\.)?{re.escape(FEATURES)}")


@dataclass(frozen=True)
class Eye:
    """What a data worker knows of a vision adapter: enough to cut images, without its weights.

    Attributes:
        tiling: How images are cut.
        fingerprint: Of the tower whose features are taken; None where no shard holds any.
        max_pixels: Of the largest image that is decoded.
    """

    tiling: Tiling
    fingerprint: str | None = None
    max_pixels: int = MAX_PIXELS

    def views(self, sample: Sample) -> list[CropViews]:
        """Return the images of a sample, in order; none for a sample without.

        Raises ValueError for fields that do not say which image comes first, and for features of
        another tower.
        """
        if LAYOUTS in sample:
            return self._seen(sample)
        return self.tiling.views(
            [
                open_image(sample[name], max_pixels=self.max_pixels)
                for name in numbered(sample, IMAGE_FIELD)
            ]
        )

    def _seen(self, sample: Sample) -> list[CropViews]:
        made_by, layouts = read_layouts(sample[LAYOUTS])
        if made_by != self.fingerprint:
            raise ValueError(f"it {OTHER_TOWER}")
        names = numbered(sample, FEATURE_FIELD)
        if len(names) != len(layouts):
            raise ValueError(f"it has {len(names)} {FEATURES} but {len(layouts)} layouts")
        arrays = (np.array(read_array(sample[name])) for name in names)  # copies, to write to
        return [
            CropViews(torch.from_numpy(array), layout)
            for array, layout in zip(arrays, layouts, strict=True)
        ]


OTHER_TOWER = (
    "holds features of another vision tower or tiling than the model has; extract them again with "
    "data_pipelines.extract_features, or train from the images"
)


def feature_fields(
    sample: Sample, seen: Iterable[CropViews], *, made_by: str, dtype: np.dtype
) -> Sample:
    """Return the fields that hold the tower's features of a sample's images, which `Eye` reads.

    Args:
        sample: That the images are of.
        seen: Features of each image, in order.
        made_by: `fingerprint` of the adapter.
        dtype: That the features are stored in.

    Returns:
        Fields to add to the sample.

    Raises:
        ValueError: Where a feature is too large for `dtype`.
    """
    fields: Sample = {}
    layouts = []
    for name, image in zip(numbered(sample, IMAGE_FIELD), seen, strict=True):
        array = image.crops.detach().float().cpu().numpy()  # [C, P, D_tower]
        with np.errstate(over="ignore"):
            stored = array.astype(dtype)
        if np.isinf(stored).any():
            raise ValueError(f"features up to {np.abs(array).max():.3g} do not fit in {dtype}")
        number = IMAGE_FIELD.fullmatch(name)
        assert number is not None
        fields[f"{number[1]}.{FEATURES}" if number[1] else FEATURES] = encode_array(stored)
        layouts.append(image.layout.to_dict())
    fields[LAYOUTS] = json.dumps({"fingerprint": made_by, "layouts": layouts}).encode()
    return fields


def read_layouts(data: bytes) -> tuple[str, list[FeatureLayout]]:
    """Read what `feature_fields` writes beside the features: (fingerprint, layouts)."""
    try:
        record = parsed(data)
        return str(record["fingerprint"]), [FeatureLayout(**layout) for layout in record["layouts"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"its {LAYOUTS} is damaged: {error}") from None


def numbered(sample: Sample, field: re.Pattern[str]) -> list[str]:
    """Fields of one kind in the order of their numbers; ValueError where there is no such order."""
    found = [(match[1], name) for name in sample if (match := field.fullmatch(name))]
    numbers = [number for number, _ in found]
    if len(found) > 1 and (None in numbers or len({int(n or 0) for n in numbers}) < len(found)):
        names = ", ".join(name for _, name in found)
        raise ValueError(f"no order among its images ({names}); name them 0.png, 1.png ...")
    return [name for _, name in sorted(found, key=lambda one: int(one[0] or 0))]


def fingerprint(adapter: VisionAdapter) -> str:
    """sha256 over all that the features of an image depend on: the tower, pixels and the tiling.

    The projector has no part in it.
    """
    config = adapter.config.to_dict()
    del config["projector"]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    idle = {id(parameter) for parameter in adapter.tower.idle_parameters()}
    for name, parameter in sorted(adapter.tower.named_parameters()):
        if id(parameter) not in idle:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


# ---- sources ------------------------------------------------------------------------------------


class Seeing(ToSequence):
    """Makes one document of a sample with images that a vision adapter looks at.

    Attributes:
        needs_eyes: Whether a model without a vision adapter can make nothing of it.
    """

    needs_eyes: ClassVar[bool] = True

    def __call__(
        self,
        sample: Sample,
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Sequence:
        raise AssertionError("`attach_vision` gives sources of images the eye of a model")

    @abstractmethod
    def sequence(
        self,
        sample: Sample,
        views: list[CropViews],
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Sequence:
        """As `ToSequence.__call__`, given the images of the sample in their order."""


@dataclass(frozen=True)
class Through(ToSequence):
    """A source of images with the eye of a model; None: it has none, and sees no images."""

    seeing: Seeing
    eye: Eye | None

    @property
    def fields(self) -> tuple[str, ...] | None:
        return self.seeing.fields

    def __call__(
        self,
        sample: Sample,
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Sequence:
        views = [] if self.eye is None else self.eye.views(sample)
        return self.seeing.sequence(
            sample, views, vocabulary, tokenizer=tokenizer, generator=generator
        )


@dataclass(frozen=True)
class SeenCaption(Seeing):
    """`images, text_slots tokens of text`; the text is target, closed and filled up by eos.

    Attributes:
        text_slots: Tokens of text, the closing eos included; None: `train.pretrain` computes it
            from the data.
        text: Field of the text: "txt", or a place in a JSON field such as "json.captions".
        cut_long_text: Cut a text that needs more than text_slots; otherwise such a sample counts as
            broken and is skipped.
    """

    text_slots: int | None = None
    text: str = "txt"
    cut_long_text: bool = False

    def __post_init__(self) -> None:
        check_slots(self.text_slots)

    def teaches(self, samples: Iterable[Sample]) -> frozenset[str]:
        """Return the one task there is."""
        return frozenset({"caption"})

    def sequence(
        self,
        sample: Sample,
        views: list[CropViews],
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Sequence:
        if not views:
            raise ValueError(f"no image among its fields ({', '.join(field_names(sample))})")
        ids = slots_of(
            field_text(sample, self.text, generator=generator),
            self.text_slots,
            vocabulary=vocabulary,
            tokenizer=tokenizer,
            cut_long_text=self.cut_long_text,
        )
        images = (image_segment(image, vocabulary) for image in views)
        return Sequence((*images, text_segment(ids, target=True)))


def attach_vision(sources: Iterable[Source], adapter: VisionAdapter | None) -> list[Source]:
    """Return the sources, those of images with the adapter of the model that is trained.

    Raises ValueError where images meet a model without vision, where features were made by
    another tower, and where a tower is to be trained on features, through which it cannot learn.
    The first sample of each source tells what it holds.
    """
    sources = list(sources)
    seeing = [
        (source, source.to_sequence) for source in sources if isinstance(source.to_sequence, Seeing)
    ]
    if not seeing:
        return sources
    if adapter is None:
        for source, to_sequence in seeing:
            if to_sequence.needs_eyes:
                raise ValueError(
                    f"{source.urls}: {type(to_sequence).__name__} needs a model that sees; "
                    "give it `vision`, or start from one"
                )
        return _looked_at(sources, None)
    made_by = {url: made for source, _ in seeing for url, made in [_first_features(source)] if made}
    eye = Eye(adapter.config.tiling, fingerprint(adapter) if made_by else None)
    for url, made in made_by.items():
        if made != eye.fingerprint:
            raise ValueError(f"{url} {OTHER_TOWER}")
        if any(parameter.requires_grad for parameter in adapter.tower.parameters()):
            raise ValueError(
                f"{url} holds features, through which the tower cannot learn; freeze "
                "vision_tower, or train from the images"
            )
    return _looked_at(sources, eye)


def _looked_at(sources: list[Source], eye: Eye | None) -> list[Source]:
    return [
        replace(source, to_sequence=Through(source.to_sequence, eye))
        if isinstance(source.to_sequence, Seeing)
        else source
        for source in sources
    ]


def _first_features(source: Source) -> tuple[str, str | None]:
    """Return a source's first shard, and the fingerprint of the features of its first sample."""
    url = source.shards()[0]
    try:
        sample = next(read_shard(url), None)
    except BrokenShard:  # the stream counts it
        return url, None
    if sample is None or LAYOUTS not in sample:
        return url, None
    return url, read_layouts(sample[LAYOUTS])[0]
