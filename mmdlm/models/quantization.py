"""Weights in fewer bits, by bitsandbytes or torchao, where they are installed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from mmdlm.vision.checkpoint_files import shown

# name -> the library that does it
KINDS = {
    "4bit": "bitsandbytes",
    "8bit": "bitsandbytes",
    "int8": "torchao",
    "int4": "torchao",
    "float8": "torchao",
}
# Left as they are: the head picks among all ids, and a vision tower is small.
KEPT = ("lm_head", "vision")
# Where the config objects of transformers name the modules that are left as they are.
KEPT_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")


def quantization_config(kind: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
    """What `from_pretrained` takes as `quantization_config`.

    kind    "4bit" (NF4) or "8bit" (LLM.int8) by bitsandbytes; "int8", "int4" or "float8" weights by
            torchao; or any config object of transformers, which keeps what it says
    dtype   of the computation
    device  that the weights will be on

    The head and the vision adapter stay as they are, unless a config object names other modules.
    Raises ValueError for an unknown kind, a package that is not installed, or a device on which the
    kind does not run.
    """
    if not isinstance(kind, str):
        return _with_kept(kind)
    if kind not in KINDS:
        raise ValueError(
            f"quantization {kind!r} is not one of {', '.join(KINDS)}; or give a quantization "
            "config of transformers"
        )
    needed = (KINDS[kind], "accelerate") if KINDS[kind] == "bitsandbytes" else (KINDS[kind],)
    missing = [package for package in needed if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"quantization {kind!r} needs {' and '.join(missing)}; install with: pip install "
            f"{' '.join(missing)}"
        )
    return _bitsandbytes(kind, dtype) if KINDS[kind] == "bitsandbytes" else _torchao(kind, device)


def check_stored(config: Mapping[str, Any]) -> None:
    """Raise ValueError for weights that a config.json says were quantized by another library.

    transformers knows thirty, and fetches code for some of them.
    """
    given = config.get("quantization_config")
    if given is None:
        return
    method = given.get("quant_method") if isinstance(given, Mapping) else given
    known = sorted(set(KINDS.values()))
    if method not in known:
        raise ValueError(
            f"config.json has a quantization_config by {shown(method)}, which is not read here; "
            f"known are {' and '.join(known)}"
        )


def _bitsandbytes(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(KEPT),
    )


def _torchao(kind: str, device: torch.device) -> Any:
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )
    from transformers import TorchAoConfig

    match kind:
        case "int8":
            weights = Int8WeightOnlyConfig()
        case "float8":
            weights = Float8WeightOnlyConfig()
        case _:
            if device.type != "cuda":
                raise ValueError(
                    f"quantization {kind!r} runs on CUDA alone, not on {device}; take '4bit' or "
                    "'int8' there"
                )
            # torch's own kernel; torchao's default format needs another package
            weights = Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")
    return TorchAoConfig(weights, modules_to_not_convert=list(KEPT))


def _with_kept(config: Any) -> Any:
    """The config object, with our modules left as they are where it names none."""
    config = copy.deepcopy(config)
    for field in KEPT_FIELDS:
        if getattr(config, field, KEPT) is None:
            setattr(config, field, list(KEPT))
    return config
