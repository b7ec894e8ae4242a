"""What a source is: shards, and the one function that makes a Sequence of each of their samples."""

from __future__ import annotations

import ast
import io
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.shards.shards import Sample, expand_urls
from data_pipelines.sources.text_files import decoded, parsed
from mmdlm.core.sequence import Sequence
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.templates.infill import check_whole
from mmdlm.vision.image_files import MAX_PIXELS, open_image

IMAGES = ("png", "jpg", "jpeg", "webp")
LONGEST_TOKEN = 256  # characters of text that a token stands for, at the most that is reckoned with
# What a damaged image, text or array raises; anything else is a mistake in the code.
BROKEN_CONTENT = (
    ValueError,  # bad JSON, bad UTF-8, a broken image, a field that is missing or does not fit
    OSError,  # a file that cannot be read
    EOFError,
    zlib.error,
)


class TextTokenizer(Protocol):
    """The part of transformers' tokenizers that sources use."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]: ...


def letters_of(text: str, tokenizer: TextTokenizer) -> list[int]:
    """Return the ids of a text that is learned; the name of a special token in it is plain text."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


class ToSequence(ABC):
    """Makes one document of one sample: which segments there are, and which are targets.

    A new data set is one frozen dataclass of this kind; YAML names it by its class path. Raises
    ValueError for a sample that it cannot use, which is then counted, reported and skipped.
    """

    @property
    def fields(self) -> tuple[str, ...] | None:
        """Extensions of the fields that are read, to spare the memory of others; None: all."""
        return None

    def teaches(self, samples: Iterable[Sample]) -> frozenset[str] | None:
        """Return the tasks of `mmdlm.pipeline.model.Model` that its documents teach; None: unknown.

        A model that is trained here records them, and refuses others.

        Args:
            samples: Some of the data, which are read where they tell.

        Returns:
            Names of tasks; None where the data does not tell.
        """
        return None

    @abstractmethod
    def __call__(
        self,
        sample: Sample,
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Sequence:
        """Return a sample as a sequence; `generator` is seeded for each sample: choices repeat."""


@dataclass(frozen=True)
class NoLonger(ToSequence):
    """Another one's documents, where none has more tokens than a model has positions.

    Documents that share a row have positions of their own, so that a row may be longer.
    """

    of: ToSequence
    positions: int

    @property
    def fields(self) -> tuple[str, ...] | None:
        return self.of.fields

    def __call__(
        self,
        sample: Sample,
        vocabulary: Vocabulary,
        *,
        tokenizer: TextTokenizer,
        generator: torch.Generator,
    ) -> Sequence:
        sequence = self.of(sample, vocabulary, tokenizer=tokenizer, generator=generator)
        tokens = max(map(len, sequence.documents))
        if tokens > self.positions:
            raise ValueError(
                f"a document of {tokens} tokens is longer than the {self.positions} positions of "
                "the model (max_position_embeddings); shorten it"
            )
        return sequence


@dataclass(frozen=True)
class Source:
    """Shards (see `expand_urls`), how to read them, and how often relative to other sources.

    Attributes:
        sampling_weight: Field with the probability that an epoch contains a sample, such as
            "json.sampling_weight"; it balances sets in which some subjects have many samples.
            Without it, every epoch contains every sample.
        allow_pipe: Run the commands of shards that are given as pipe:COMMAND.
    """

    urls: str | list[str]
    to_sequence: ToSequence
    weight: float = 1.0
    sampling_weight: str | None = None
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"source {self.urls}: weight {self.weight} must be positive")

    def shards(self) -> list[str]:
        """Return the shards that the urls name; ValueError where they name none."""
        return expand_urls(self.urls, allow_pipe=self.allow_pipe)


def field_text(sample: Sample, field: str, *, generator: torch.Generator) -> str:
    """Return the text of a sample: "txt", or a place in a JSON field such as "json.names.de".

    A list of texts (the captions of one image) gives one of them. Raises ValueError where there
    is no such text.
    """
    value = field_value(sample, field)
    if isinstance(value, list) and value:
        value = value[int(torch.randint(len(value), (), generator=generator))]
    if not isinstance(value, str):
        raise ValueError(f"its {field!r} is no text but {type(value).__name__}")
    check_whole(value)
    return value


def field_weight(sample: Sample, field: str) -> float:
    """Return the sampling weight of a sample; ValueError where it is no number in (0, 1]."""
    value = field_value(sample, field)
    try:
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 < weight <= 1:
        raise ValueError(f"its {field} is {value!r}; a sampling weight lies in (0, 1]")
    return weight


def field_value(sample: Sample, field: str) -> Any:
    """Return the text of a field, or what lies at a place in a JSON field ("json.names.de")."""
    extension, *path = field.split(".")
    if extension not in sample:
        raise ValueError(f"no {extension!r} among its fields ({', '.join(field_names(sample))})")
    if not path:
        return decoded(sample[extension])
    value: Any = parsed(sample[extension])
    for name in path:
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"its {extension} has no {'.'.join(path)!r}")
        value = value[name]
    return value


def field_codes(
    sample: Sample, vocabulary: Vocabulary, *, field: str = "codes.npy", count: int | None = None
) -> Tensor:
    """Return the image codes of a sample, [K] int64 in raster order.

    Args:
        sample: Of a code shard.
        vocabulary: Gives the number of codes that there are.
        field: A .npy file of any shape.
        count: K; None: any number.

    Returns:
        [K] int64, counted from 0.
    """
    if field not in sample:
        raise ValueError(
            f"no {field!r} among its fields ({', '.join(field_names(sample))}); "
            "data_pipelines.tokenize_images adds the codes"
        )
    codes = read_array(sample[field]).reshape(-1)
    if codes.dtype.kind not in "iu":
        raise ValueError(f"its {field} holds {codes.dtype}, not codes")
    if codes.size == 0 or codes.min() < 0 or codes.max() >= vocabulary.image_codes:
        raise ValueError(
            f"its {field} does not fit a vocabulary of {vocabulary.image_codes} image codes"
        )
    if count is not None and codes.size != count:
        raise ValueError(f"its {field} has {codes.size} codes, but an image has {count} here")
    return torch.from_numpy(codes.astype(np.int64))


def field_image(sample: Sample, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image of a sample, RGB; ValueError for none, or one of more pixels."""
    for extension in IMAGES:
        if extension in sample:
            return open_image(sample[extension], max_pixels=max_pixels)
    raise ValueError(f"no image among its fields ({', '.join(field_names(sample))})")


def field_names(sample: Sample) -> list[str]:
    """Extensions of a sample's fields."""
    return [name for name in sample if not name.startswith("_")]


def read_array(data: bytes) -> np.ndarray:
    """Read a .npy file; the header, which takes most of the time, is parsed once per shape."""
    if data[:6] != b"\x93NUMPY" or len(data) < 12:
        raise ValueError("a .npy field is no numpy array")
    start, size = (10, 2) if data[6] == 1 else (12, 4)
    stop = start + int.from_bytes(data[8 : 8 + size], "little")
    dtype, shape, is_fortran = _header(data[start:stop])
    if is_fortran or len(data) - stop != dtype.itemsize * math.prod(shape):
        raise ValueError("a .npy field is truncated or in Fortran order")
    return np.frombuffer(data, dtype, offset=stop).reshape(shape)


@lru_cache(maxsize=256)
def _header(text: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    try:
        header = ast.literal_eval(text.decode("latin1"))
        dtype, shape = np.dtype(header["descr"]), tuple(header["shape"])
        is_fortran = bool(header["fortran_order"])
    except Exception as error:  # a damaged text may mean anything to the two parsers
        raise ValueError(f"a .npy field has a damaged header: {error}") from None
    if dtype.hasobject:
        raise ValueError("a .npy field holds Python objects, which are not read")
    if not dtype.itemsize or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"a .npy field has a damaged header: {dtype}, shape {shape}")
    return dtype, shape, is_fortran


def png_bytes(image: Image.Image) -> bytes:
    """Encode an image as PNG, without loss."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def encode_array(array: np.ndarray) -> bytes:
    """Return an array as a .npy file."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array))
    return file.getvalue()
