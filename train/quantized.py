"""Weights in fewer bits that stay as they are, beside an adapter that learns (QLoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn

from mmdlm.models.quantization import (
    KINDS,
    TRAINABLE,
    check_widths,
    is_quantized,
    quantization_config,
)
from train.stages.low_rank import Adapted


@dataclass(frozen=True)
class FrozenBase:
    """How weights that stay as they are lie in memory.

    Attributes:
        quantization: One of `mmdlm.models.quantization.TRAINABLE`; None: as they are stored.
        device: That they are trained on, where they are quantized as they are read.
    """

    quantization: str | None
    device: torch.device

    def options(self, config: Any, *, dtype: torch.dtype) -> dict[str, Any]:
        """Return options of `load_denoiser` for a model of this config.

        Args:
            config: Of transformers.
            dtype: Of the computation.

        Returns:
            Keyword arguments.

        Raises:
            ValueError: The weights cannot be quantized on this device.
        """
        if self.quantization is None:
            return {}
        check_widths(self.quantization, config, device=self.device)
        given = quantization_config(self.quantization, dtype=dtype, device=self.device)
        return {"quantization_config": given, "device_map": str(self.device)}


def check_base(quantization: str | None, *, adapts: bool, sees: bool, starts: bool) -> None:
    """Raise ValueError for weights that are to be quantized and cannot be trained so.

    Args:
        quantization: What was asked for; None: nothing.
        adapts: Whether an adapter learns.
        sees: Whether the run gives the model a vision adapter.
        starts: Whether there are weights to start from.
    """
    if quantization is None:
        return
    if quantization not in TRAINABLE:
        why = "has no gradient" if quantization in KINDS else "is not known"
        raise ValueError(f"quantization {quantization!r} {why}; take {', '.join(TRAINABLE)}")
    if not starts:
        raise ValueError(
            f"quantization {quantization} is of weights that stay as they are, and a new model has "
            "none; give model.start_from in place of model.shape"
        )
    if not adapts:
        raise ValueError(
            f"quantization {quantization}: quantized weights have no gradient; "
            "give `model.lora`, whose matrices learn beside them, or leave quantization out to "
            "train all weights"
        )
    if sees:
        raise ValueError(
            f"quantization {quantization}: the adapter is all that is saved, and would lack the "
            "vision adapter of `model.vision`; train that first, without quantization"
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(
            f"quantization {quantization}: FSDP does not shard quantized weights; launch without it"
        )


def check_adapter_is_all(adapted: Adapted, denoiser: nn.Module) -> None:
    """Raise ValueError where more learns beside a quantized base than its adapter holds."""
    if any(map(is_quantized, denoiser.parameters())) and not adapted.is_all_that_learns:
        raise ValueError(
            "the weights to start from are quantized, so that the adapter is all that is saved, "
            "but the vision adapter learns too; freeze it: model.parts.frozen: [vision_tower, "
            "projector]"
        )
