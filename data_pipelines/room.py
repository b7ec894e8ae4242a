"""What would not fit in memory is refused before any of it is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import torch
from torch import nn

CPU = torch.device("cpu")
# Where Linux says how much memory the processes of a container may have together.
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
TOKEN_BYTES = 41  # of a batch, for each token: five int64 and a bool
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))


def room(device: torch.device = CPU) -> int:
    """Return the bytes of memory of a device, whatever of it is in use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [_number(Path(path)) for path in CGROUP_LIMITS]
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])


def check_room(
    what: str, needs: Mapping[str, float], *, mend: str, device: torch.device = CPU
) -> None:
    """Raise ValueError for what needs more memory than there is.

    Args:
        what: Its name in the settings.
        needs: Bytes that it takes at least, by what they are for.
        mend: What to make smaller.
        device: Where it will lie.
    """
    total, there = sum(needs.values()), room(device)
    if total <= there:
        return
    parts = ", ".join(f"{_said(size)} of {name}" for name, size in needs.items() if size > 0)
    where = "this machine" if device.type == "cpu" else str(device)
    raise ValueError(
        f"{what} needs at least {_said(total)} of memory ({parts}), but {where} has "
        f"{_said(there)}; make {mend} smaller"
    )


def check_batch(rows: int, length: int, *, states: float = 0, device: torch.device = CPU) -> None:
    """Raise ValueError for a batch that needs more memory than there is.

    Args:
        rows: Of the batch.
        length: Tokens of a row.
        states: Bytes of what a model keeps of it.
        device: Where the batch will lie.
    """
    check_room(
        f"a batch of {rows} rows of {length} tokens",
        {"ids": TOKEN_BYTES * rows * length, "states": states},
        mend="batch_size or length",
        device=device,
    )


def bytes_of(build: Callable[[], nn.Module]) -> int:
    """Return the bytes of the parameters and buffers of a module, of which none are allocated."""
    try:
        with torch.device("meta"):
            module = build()
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        return 1 << 63  # more than torch can count
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _number(path: Path) -> int | None:
    """Return the number in a file; None where there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _said(size: float) -> str:
    unit, name = next((pair for pair in UNITS if size >= pair[0]), UNITS[-1])
    return f"{size / unit:,.1f} {name}"
