"""Weights in fewer bits, by bitsandbytes or torchao, where they are installed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mmdlm.core.kernels.linear import Linear
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
TRAINABLE = tuple(kind for kind in KINDS if kind != "int4")  # torch's int4 product has no gradient


def quantization_config(kind: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Return what `from_pretrained` takes as `quantization_config`.

    The head and the vision adapter stay as they are, unless a config object names other modules.
    Raises ValueError for an unknown kind, a package that is not installed, or a device on which the
    kind does not run.

    Args:
        kind: "4bit" (NF4) or "8bit" (LLM.int8) by bitsandbytes; "int8", "int4" or "float8" weights
            by torchao; or any config object of transformers, which keeps what it says.
        dtype: Of the computation.
        device: That the weights will be on.

    Returns:
        A config object of transformers.
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


def check_widths(kind: Any, config: Any, *, device: torch.device) -> None:
    """Raise ValueError where bitsandbytes has no kernel for the widths of a model on a CPU."""
    widths = {getattr(config, name, 0) for name in ("hidden_size", "intermediate_size")}
    if kind == "4bit" and device.type == "cpu" and any(width % 64 for width in widths):
        raise ValueError(
            f"quantization '4bit' runs on a CPU only for widths that are multiples of 64, not "
            f"{' and '.join(map(str, sorted(widths)))}; take 'int8'"
        )


def offer_layers(model: nn.Module) -> None:
    """Make a model's layers torch's own where bitsandbytes is to replace them.

    transformers replaces exactly `nn.Linear` by the layers of bitsandbytes, and no subclass of it.
    """
    if _method(model) == "bitsandbytes":
        for module in model.modules():
            if type(module) is Linear:
                module.__class__ = nn.Linear  # type: ignore[assignment]


def take_back_layers(model: nn.Module) -> None:
    """Make the layers that were offered and not replaced ours again.

    Args:
        model: That transformers has quantized; it is changed.

    Raises:
        ValueError: Weights should be in fewer bits by now, and none are.
    """
    method = _method(model)
    if method is None:
        return
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name.split(".")[0] != "vision":
            module.__class__ = Linear
    if not any(is_quantized(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"no weight was quantized by {method}, though it was asked to; the installed version "
            "of transformers does not know the layers of this model: install another"
        )


def is_quantized(parameter: torch.Tensor) -> bool:
    """Return whether a parameter is held in the format of bitsandbytes or torchao."""
    module = type(parameter).__module__
    return module.partition(".")[0] in KINDS.values() or parameter.dtype in (
        torch.uint8,
        torch.int8,
    )


def _method(model: nn.Module) -> str | None:
    """Return the library that quantized the weights of a model's config."""
    given = getattr(getattr(model, "config", None), "quantization_config", None)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        given = {"quant_method": getattr(given, "quant_method", None)}
    method = given.get("quant_method")
    return str(getattr(method, "value", method))


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
                    f"quantization {kind!r} runs only on CUDA, not on {device}; take '4bit' or "
                    "'int8' there"
                )
            # torch's own kernel; torchao's default format needs another package
            weights = Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")
    return TorchAoConfig(weights, modules_to_not_convert=list(KEPT))


def _with_kept(config: Any) -> Any:
    """Return the config object; our modules stay as they are where it names none."""
    config = copy.deepcopy(config)
    for field in KEPT_FIELDS:
        if getattr(config, field, KEPT) is None:
            setattr(config, field, list(KEPT))
    return config
