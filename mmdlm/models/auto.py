"""Which of our denoisers a folder holds: the Transformer or a published encoder."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from mmdlm.models.checkpoints.run_steps import parts_of
from mmdlm.models.encoder import MmdlmEncoder
from mmdlm.models.encoder_config import MmdlmEncoderConfig
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.vision.checkpoint_files import read_json

PretrainedDenoiser = MmdlmForMaskedDiffusion | MmdlmEncoder


def load_denoiser(folder: str | PathLike[str], **options: Any) -> PretrainedDenoiser:
    """Load the denoiser of a local folder: ours, a published family's, or a step of a run.

    Args:
        folder: With config.json and weights.
        **options: Of transformers' `from_pretrained`: dtype, attn_implementation ...

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: For a file that is missing or damaged, a model that is none of these, and
            tensors that do not fit.
    """
    config = read_json(parts_of(Path(folder)) / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    is_encoder = kind == MmdlmEncoderConfig.model_type
    denoiser = MmdlmEncoder if is_encoder else MmdlmForMaskedDiffusion
    model: PretrainedDenoiser = denoiser.from_pretrained(folder, **options)
    return model
