"""Checkpoints without the weights that stay as they are: an adapter's are small beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FILE = "frozen.json"
WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numbers of so many bytes


@dataclass(frozen=True)
class Frozen:
    """Parameters that checkpoints leave out, and know by a fingerprint.

    A run that is continued finds them where it found them first.
    """

    names: frozenset[str]
    fingerprint: str

    @classmethod
    def of(cls, module: nn.Module) -> Frozen | None:
        """Those of a module; None where all of it learns.

        What a quantizer keeps beside a weight, such as its scales, is frozen with it.
        """
        buffers = {id(buffer) for buffer in module.buffers()}
        frozen, seen = {}, set(buffers)
        for name, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen and not tensor.requires_grad:
                frozen[name] = tensor
            seen.add(id(tensor))  # a tied tensor goes under its first name
        return cls(frozenset(frozen), fingerprint(frozen)) if frozen else None

    def write(self, folder: Path) -> None:
        """Note in a checkpoint what is left out."""
        (folder / FILE).write_text(self._content)

    def check(self, folder: Path) -> None:
        """Raise ValueError where a checkpoint was written beside others."""
        path = folder / FILE
        if not path.is_file() or path.read_bytes() != self._content.encode():
            raise ValueError(
                f"{folder} was written beside other frozen weights than there are now; start from "
                "the model that the run started from, or train into another folder"
            )

    @property
    def _content(self) -> str:
        return json.dumps({"fingerprint": self.fingerprint}) + "\n"


def fingerprint(parameters: dict[str, Any]) -> str:
    """Return a digest of names, shapes and sums of the bits, in which the order does not matter."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(parameters):
        for inner, tensor in _plain(name, parameters[name].detach()):
            tensor = tensor.contiguous()
            total = tensor.view(WHOLE[tensor.element_size()]).sum(dtype=torch.int64)
            digest.update(f"{inner} {list(tensor.shape)} {int(total)};".encode())
    return digest.hexdigest()


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor by its name, or the tensors that a quantized one (torchao) is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))
