"""What a result was measured on: the checkpoint, the machine, and files by their sha256."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmdlm.generate import Model
from mmdlm.loading import find_checkpoint


def describe_model(name: str, model: Model) -> dict[str, Any]:
    """The checkpoint: its size, and sha256 of each file of weights, as `sha256sum` gives it."""
    folder = find_checkpoint(name)
    return {
        "name": name,
        "sha256": {
            path.relative_to(folder).as_posix(): sha256_of(path)
            for path in sorted(folder.rglob("*.safetensors"))
        },
        "parameters": {
            "denoiser": _parameters(model.denoiser),
            "image_tokenizer": _parameters(model.image_tokenizer),
        },
        "codes": model.denoiser.vocabulary.image_codes,
        "text_ids": model.denoiser.vocabulary.text[1] - model.denoiser.vocabulary.text[0],
    }


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """The machine, and how busy it is before the measurement."""
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
