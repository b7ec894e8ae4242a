"""Choose the device of a model."""

from __future__ import annotations

import torch

from mmdlm.pipeline.hub import first_sentence

WITHOUT_FLOAT64 = ("mps",)  # kinds of devices


def sampling_device(device: torch.device) -> torch.device:
    """Return where the sampler of a denoiser on a device keeps its state: it needs float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def device_named(device: torch.device | str | None) -> torch.device:
    """Return a device that is there.

    Args:
        device: Its name; None: a CUDA GPU if there is one, or Apple's GPU (mps), else the CPU.

    Returns:
        The device, with its number.

    Raises:
        ValueError: For one that is unknown or absent.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch's, for unknown and for absent ones
        raise ValueError(
            f"device {str(device)!r} cannot be used here ({first_sentence(error)}); take 'cpu', or "
            "leave it out"
        ) from error
