"""Load an image tokenizer of any known family, by the name in its config.json."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from mmdlm.vision.tokenizers.base import ImageTokenizer
from mmdlm.vision.tokenizers.stored_tokenizer import (
    CONFIG,
    family_of,
    find_weights,
    read_config,
    tensor_names,
)


def load_image_tokenizer(folder: str | PathLike[str]) -> ImageTokenizer:
    """Load a tokenizer of any family that mmdlm knows, by the name in its config.json.

    A published config may be empty: the names of the tensors tell the family then, and its options
    are the defaults, those of the published tokenizer. Raises ValueError that names the file,
    tensor or family at fault.
    """
    family = family_of(read_config(folder)) or _family_of_tensors(folder)
    return _tokenizer_class(family, Path(folder) / CONFIG).from_pretrained(folder)


def _tokenizer_class(family: str | None, source: Path) -> type[ImageTokenizer]:
    """Return the class of a family; each module is imported only when it is needed."""
    match family:
        case "PatchTokenizer":
            from mmdlm.vision.tokenizers.patch_tokenizer import PatchTokenizer

            return PatchTokenizer
        case "MAGVITv2":
            from mmdlm.vision.tokenizers.magvit2 import Magvit2Tokenizer

            return Magvit2Tokenizer
        case "VQModel":
            from mmdlm.vision.tokenizers.vq_model import VQModelTokenizer

            return VQModelTokenizer
    known = "PatchTokenizer, MAGVITv2, VQModel"
    if family is None:
        raise ValueError(f'{source} names no family; add "_class_name", one of {known}')
    raise ValueError(f"{source}: unknown image tokenizer {family!r}; known are {known}")


def _family_of_tensors(folder: str | PathLike[str]) -> str | None:
    """Return the family whose mark is among the names of the tensors."""
    names = tensor_names(find_weights(folder))
    marks = {"quantize.power_vals": "MAGVITv2", "quantize.embedding.weight": "VQModel"}
    return next((family for name, family in marks.items() if name in names), None)
