"""Join the processes that a launcher has started."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def joined() -> tuple[int, int]:
    """Join the processes of `accelerate launch` or torchrun: (rank, how many); (0, 1) for one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def device_of_process(device: str | None) -> str | None:
    """Choose the device of a model: each process has a GPU of its own.

    Args:
        device: As a harness gives it. "cuda" and "cuda:0" are its defaults on every machine, and
            mean a GPU where there is one. None: the same.

    Returns:
        For `mmdlm.load`: None where it chooses.
    """
    if not (device is None or device in ("cuda", "cuda:0")):
        return device
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"cuda:{torch.cuda.current_device()}" if several and torch.cuda.is_available() else None
