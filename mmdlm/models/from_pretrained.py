"""The steps of `from_pretrained`: options, checks before weights are read, and tensor names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.checkpoints.checkpoint import Checkpoint, tokenizer_size
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.families.auto import family_of
from mmdlm.models.quantization import check_stored

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Options of `from_pretrained` that put parts of the weights in different places.
SPREADING = ("distributed_config", "tp_plan", "tp_size", "offload_folder", "gguf_file")


def check_depth(config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """ValueError for more layers than tensors, before they are made to be compared."""
    tower = (config.vision or {}).get("tower") or {}
    depths = (
        config.num_hidden_layers,
        *(tower.get(name) for name in ("num_hidden_layers", "depth")),
    )
    for depth in depths:
        if type(depth) is int and depth > len(checkpoint.tensors):
            raise ValueError(
                f"checkpoint {checkpoint.folder} does not fit its config.json: {depth} layers, but "
                f"{len(checkpoint.tensors)} tensors"
            )


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether the weights were saved quantized; their names and shapes are the library's."""
    check_stored(checkpoint.config)
    return bool(checkpoint.config.get("quantization_config"))


def streams(options: dict[str, Any]) -> bool:
    """Whether we read the files; where weights go to several places, transformers does."""
    if is_deepspeed_zero3_enabled() or any(options.get(name) is not None for name in SPREADING):
        return False
    if isinstance(options.get("dtype", options.get("torch_dtype")), dict):
        return False
    return isinstance(options.get("device_map"), str | int | torch.device | None) and (
        options.get("device_map") not in ("auto", "balanced", "balanced_low_0", "sequential")
    )


def dtype_of(options: dict[str, Any], config: PreTrainedConfig) -> torch.dtype | None:
    """Take the dtype out of transformers' options; None: as stored."""
    older, newer = options.pop("torch_dtype", None), options.pop("dtype", None)
    dtype = newer if newer is not None else older
    if dtype in (None, "auto"):
        dtype = config.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def with_codes_behind(config: PreTrainedConfig, folder: Path) -> PreTrainedConfig:
    """Return the config with image codes behind the tokenizer's ids, as MMaDA has them.

    `AutoConfig` sees no tokenizer. What somebody has chosen, and a model without codes, stay.
    """
    words = None if config.vocabulary is None else Vocabulary(**config.vocabulary)
    if not config.published or words is None or not words.image_codes:
        return config
    theirs = config.published["config"]
    family = family_of(theirs)
    if words != family.vocabulary(theirs) or (size := tokenizer_size(folder)) is None:
        return config
    config = copy.deepcopy(config)
    config.vocabulary = family.vocabulary(theirs, tokenizer_size=size).to_dict()
    return config


def checkpoint_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Map a published checkpoint's tensor names to ours; empty for our own checkpoint."""
    if checkpoint.config.get("model_type") == MmdlmConfig.model_type:
        return {}
    family = family_of(checkpoint.config, checkpoint.shapes)
    return family.weights.rename(checkpoint.shapes)
