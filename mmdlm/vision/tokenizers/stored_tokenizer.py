"""The files of a stored image tokenizer: its config.json and its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from mmdlm.vision.checkpoint_files import check_stays, reason_of

CONFIG = "config.json"
# Ours, then the names under which published tokenizers are stored.
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.safetensors",  # showlab/magvitv2
    "diffusion_pytorch_model.safetensors",  # diffusers
)


def family_of(config: Mapping[str, Any]) -> str | None:
    """Return a config's family: `_class_name` (diffusers) or `model_type` (transformers)."""
    return config.get("_class_name") or config.get("model_type")


def read_config(folder: str | PathLike[str]) -> dict[str, Any]:
    """Return the content of `folder`/config.json.

    Raises ValueError when the folder or the file is missing, or the file is not a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"no folder {str(folder)!r} with an image tokenizer; check the path, or fetch a "
            "published one with: hf download OWNER/NAME --local-dir FOLDER"
        )
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing; a folder with an image tokenizer holds {CONFIG} and {WEIGHTS[0]}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # a JSON error is a ValueError
        raise ValueError(
            f"{path} cannot be read ({reason_of(error)}); copy or download it again"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(config).__name__}")
    return config


def _some(names: list[str]) -> str:
    """Return the first name, and how many follow, as the subject of a sentence."""
    if len(names) == 1:
        return f"tensor {names[0]!r} is"
    return f"tensor {names[0]!r} and {len(names) - 1} more are"


def tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors in a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged or truncated ({reason_of(error)}); copy or download it again"
        ) from error


def check_depth(config: Mapping[str, Any], tensors: int) -> None:
    """ValueError for more blocks than there are tensors, before they are made to be compared."""
    for name, value in config.items():
        counts = value if isinstance(value, list) else [value]
        if "depth" in name or "blocks" in name:
            for count in counts:
                if isinstance(count, int) and count > tensors:
                    raise ValueError(f"{name} is {value}, but there are {tensors} tensors")


def find_weights(folder: str | PathLike[str]) -> Path:
    """Return the file with the weights; ValueError where the folder has none."""
    for name in WEIGHTS:
        path = Path(folder) / name
        if path.is_file():
            check_stays(path, Path(folder))
            return path
    raise ValueError(
        f"{folder} holds no weights; one of {', '.join(WEIGHTS)} is needed "
        "(pickled .bin and .ckpt files are not read: they can run code)"
    )


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy the tensors of a safetensors file into `module`; names and shapes must agree exactly."""
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged or truncated ({reason_of(error)}); copy or download it again"
        ) from error
    wanted = module.state_dict()
    fix = f"{CONFIG} beside it describes another model, or the file is incomplete"
    if missing := sorted(wanted.keys() - stored.keys()):
        raise ValueError(f"{path}: {_some(missing)} missing; {fix}")
    if unexpected := sorted(stored.keys() - wanted.keys()):
        raise ValueError(f"{path}: {_some(unexpected)} not expected; {fix}")
    for name, tensor in wanted.items():
        if stored[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {list(stored[name].shape)} where "
                f"{list(tensor.shape)} is needed; {fix}"
            )
        if tensor.is_floating_point() and not stored[name].is_floating_point():
            raise ValueError(
                f"{path}: tensor {name!r} holds {stored[name].dtype} where fractions are needed; "
                "copy or download it again"
            )
    module.load_state_dict(stored)
