"""What a result was measured on: the checkpoint, the machine, and files by their sha256."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmdlm.pipeline.model import Model


def describe_model(name: str, model: Model) -> dict[str, Any]:
    """Return the size of a checkpoint, and the sha256 of each file of weights.

    It is where the model was read from, not looked up again: a run that goes on has a newer step by
    now, and may have dropped that one.

    Args:
        name: As it was asked for; that of a run stands for one of its checkpoints.
        model: As it was loaded.

    Returns:
        Name, step, size and digests, as JSON can hold them.
    """
    origin = model.origin
    if origin is None:
        raise ValueError(f"the model {name!r} was read from no folder")
    return {
        "name": name,
        **({} if origin.step is None else {"step": origin.step}),
        "sha256": {
            _shown(path, origin.folder): digest or sha256_of(path)
            for path, digest in origin.files.items()
        },
        "parameters": {
            "denoiser": _parameters(model.denoiser),
            "image_tokenizer": _parameters(model.image_tokenizer),
        },
        "codes": model.denoiser.vocabulary.image_codes,
        "text_ids": model.denoiser.vocabulary.text[1] - model.denoiser.vocabulary.text[0],
    }


def _shown(path: Path, folder: Path) -> str:
    """Return the place of a file of weights in the model's folder; of a step, in its run's."""
    for near in (folder, folder.parent):
        if path.is_relative_to(near):
            return path.relative_to(near).as_posix()
    return path.as_posix()


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Return the machine, and how busy it is before the measurement."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _parameters(module: object) -> int:
    return sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else 0


def sha256_of(path: Path) -> str:
    """Of a file, as `sha256sum` gives it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
