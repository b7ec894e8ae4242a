"""A tensor that lies in a file: known by its header, read when it is asked for, in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

PIECE = 16 * 2**20  # bytes of a file that are in memory at once while their dtype changes

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, in the place of a tensor where transformers loads one.

    In its own dtype a tensor is a view of the file, which the operating system pages in and out; it
    takes no memory of its own. In another it is converted piece by piece, and the file is unmapped
    after each: memory holds the result and one piece. (transformers keeps all files mapped while it
    converts, so that what the process holds grows to the size of both.)

    Attributes:
        dtype: As it is stored.
        target: As it is wanted; None: as stored.
        read: Told the number of bytes of the file after each piece.
    """

    shard: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    target: torch.dtype | None = None
    read: Callable[[int], None] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to(
        self, dtype: torch.dtype | None, *, read: Callable[[int], None] | None = None
    ) -> StoredTensor:
        """Return the same in another dtype; integers and booleans keep theirs."""
        return replace(self, target=dtype if self.dtype.is_floating_point else None, read=read)

    def get_shape(self) -> list[int]:
        """As a slice of safetensors has it."""
        return list(self.shape)

    def is_floating_point(self) -> bool:
        """As a tensor has it."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        """Return the tensor for `...`, a part of it for slices."""
        if index is not Ellipsis:
            with safe_open(self.shard, framework="pt") as file:
                part: Tensor = file.get_slice(self.name)[index]
            return part.to(self.target or self.dtype)
        if self.target in (None, self.dtype) or self.nbytes <= PIECE:
            with safe_open(self.shard, framework="pt") as file:
                whole: Tensor = file.get_tensor(self.name)
            self._tell(self.nbytes)
            return whole.to(self.target or self.dtype)
        result = torch.empty(self.shape, dtype=self.target)
        rows = max(1, PIECE * self.shape[0] // self.nbytes)
        for start in range(0, self.shape[0], rows):
            stop = min(start + rows, self.shape[0])
            # Opened for each piece: closing the file gives the memory of its pages back.
            with safe_open(self.shard, framework="pt") as file:
                piece = file.get_slice(self.name)[start:stop]
                result[start:stop] = piece
                self._tell(piece.nbytes)
        return result

    def _tell(self, count: int) -> None:
        if self.read is not None:
            self.read(count)
