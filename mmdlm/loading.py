"""From a name or a folder to a model; what is missing, damaged or does not fit is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from mmdlm.core.vocabulary import Vocabulary
from mmdlm.decoding import GENERATION, Defaults
from mmdlm.generate import Model
from mmdlm.models.transformer import MmdlmConfig, MmdlmForMaskedDiffusion
from mmdlm.vision.image_tokenizer import load_image_tokenizer

BUNDLED = Path(__file__).parent / "checkpoints"
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


def load(
    name_or_path: str | PathLike[str] = "emoji",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """Load a model: a bundled name ("emoji"), a folder, or a repository of the Hugging Face Hub.

    device  default: a CUDA GPU where there is one, else the CPU
    dtype   of the denoiser's computation; default: float32, however the weights are stored

    The folder holds config.json, model.safetensors (or its shards), tokenizer.json and
    tokenizer_config.json, image_tokenizer/ unless the model knows text alone, and at will
    generation.json (see `mmdlm.decoding.Defaults`).

    Raises ValueError when it is not found, a file is missing or damaged, a tensor is missing,
    unexpected or misshapen, or the tokenizers do not fit the vocabulary.
    """
    folder = find_checkpoint(name_or_path)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = _read_config(folder)
    weights = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / name).is_file() for name in weights):
        raise ValueError(f"{folder / weights[0]} is missing; copy or download the folder again")
    defaults = Defaults.from_json(folder / GENERATION)
    text_tokenizer = load_text_tokenizer(folder)
    with _quiet_transformers():
        denoiser = _reading(
            folder / weights[0],
            lambda: MmdlmForMaskedDiffusion.from_pretrained(
                folder, config=config, dtype=dtype or torch.float32
            ),
        )
    image_tokenizer = None
    if denoiser.vocabulary.image_codes:
        image_tokenizer = load_image_tokenizer(folder / "image_tokenizer").to(where)
    try:
        return Model(
            denoiser=denoiser.to(where).eval(),
            text_tokenizer=text_tokenizer,
            image_tokenizer=image_tokenizer,
            text_slots=config.text_slots,
            max_length=config.max_position_embeddings,
            defaults=defaults,
            device=where,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def find_checkpoint(name_or_path: str | PathLike[str]) -> Path:
    """The folder behind a bundled name, a path or the name of a repository."""
    name = str(name_or_path)
    bundled = sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))
    if name in bundled:
        return BUNDLED / name
    path = Path(name_or_path).expanduser()
    if name.strip() and path.is_dir():  # Path("") is the current folder
        return path
    choice = (
        f"give a bundled name ({', '.join(bundled) or 'none is installed'}), the folder of a "
        "checkpoint, or OWNER/NAME of the Hugging Face Hub"
    )
    if path.is_file():
        raise ValueError(f"{name!r} is a file, not a model; {choice}")
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"no model {name!r}; {choice}")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        reason = _one_line(error).split(". ")[0]
        raise ValueError(
            f"no folder {name!r}, and the Hugging Face Hub does not give it ({reason}); {choice}"
        ) from error


def _read_config(folder: Path) -> MmdlmConfig:
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing; the folder of a model holds config.json, model.safetensors, "
            "tokenizer.json and image_tokenizer/"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy or download it again") from error
    family = content.get("model_type") if isinstance(content, dict) else None
    if family != MmdlmConfig.model_type:
        raise ValueError(
            f"{path} describes a model of type {family!r}; {MmdlmConfig.model_type!r} is needed"
        )
    if not isinstance(content.get("vocabulary"), dict):
        raise ValueError(f"{path}: vocabulary is missing; mend it or download it again")
    try:
        Vocabulary(**content["vocabulary"])
        return MmdlmConfig.from_dict(content)
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = _one_line(error).replace("Vocabulary.__init__()", "vocabulary")
        raise ValueError(f"{path}: {reason}; mend it or download it again") from error


def load_text_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; copy or download the folder again")
    with _quiet_transformers():
        tokenizer: PreTrainedTokenizerFast = _reading(
            folder / "tokenizer.json", lambda: PreTrainedTokenizerFast.from_pretrained(folder)
        )
    return tokenizer


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns; what libraries raise on damaged files becomes one sentence."""
    try:
        return read()
    except Exception as error:
        # transformers raises OSError, safetensors its own, tokenizers bare Exception
        if type(error) is ValueError and str(path.parent) in str(error):
            raise  # it says what is wrong and where
        raise ValueError(
            f"{path} is damaged or does not fit its config ({_one_line(error)}); "
            "copy or download the folder again"
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and reports of transformers on the user's terminal; then everything as it was."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
