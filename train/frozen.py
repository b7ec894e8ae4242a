"""Checkpoints without the weights that stay as they are: an adapter's are small beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_model
from torch import Tensor, nn

FILE = "frozen.json"
WEIGHTS = "model.safetensors"
WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numbers of so many bytes


def leave_out_frozen(accelerator: Accelerator, module: nn.Module) -> None:
    """Let checkpoints of a run leave out what of a module is frozen, and know it by a fingerprint.

    A run that is continued finds it where it found it first. Raises ValueError, when it does, where
    that has changed.
    """
    parameters = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    if not parameters:
        return
    known = fingerprint(parameters)

    def on_save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        for state in weights:
            for name in [n for n in state if n.removeprefix("module.") in parameters]:
                del state[name]
        if accelerator.is_main_process:
            (Path(folder) / FILE).write_text(json.dumps({"fingerprint": known}) + "\n")

    def on_load(models: list[nn.Module], folder: str) -> None:
        if not (Path(folder) / FILE).is_file():
            return  # a checkpoint of all weights
        if json.loads((Path(folder) / FILE).read_text())["fingerprint"] != known:
            raise ValueError(
                f"{folder} was written beside other frozen weights than there are now; start from "
                "the model that the run started from, or train into another folder"
            )
        for model in models:
            missing, unexpected = load_model(model, Path(folder) / WEIGHTS, strict=False)
            lost = [name for name in missing if name.removeprefix("module.") not in parameters]
            if lost or unexpected:
                raise RuntimeError(f"missing {lost}, unexpected {unexpected}")
        models.clear()  # accelerate has none left to load

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.register_load_state_pre_hook(on_load)


def fingerprint(parameters: dict[str, Any]) -> str:
    """A digest of names, shapes, and the sums of the bits, which no order of adding changes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(parameters):
        tensor = parameters[name].detach().contiguous()
        total = tensor.view(WHOLE[tensor.element_size()]).sum(dtype=torch.int64)
        digest.update(f"{name} {list(tensor.shape)} {int(total)};".encode())
    return digest.hexdigest()
