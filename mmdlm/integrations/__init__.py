"""Make transformers' Auto classes, and PEFT where it is installed, know our models.

>>> import mmdlm.integrations
>>> from transformers import AutoModelForMaskedLM
>>> model = AutoModelForMaskedLM.from_pretrained("GSAI-ML/LLaDA-8B-Instruct")
"""

from __future__ import annotations

from importlib.util import find_spec

from mmdlm.integrations import processor as processor  # registers it with transformers
from mmdlm.models import auto as auto  # registers our classes
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.encoder_config import MmdlmEncoderConfig

# The linear maps of a layer; a vision tower's keep their weights.
LORA_TARGETS = {
    MmdlmConfig.model_type: r"(.*\.)?model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
    MmdlmEncoderConfig.model_type: (
        r"encoder\..*layers?\.\d+\..*(query|key|value|dense|Wqkv|Wi|Wo|\w+_proj)"
    ),
}


def _tell_peft() -> None:
    """Name the modules that a LoRA changes where its config names none."""
    from peft.utils import constants

    for name, known in vars(constants).items():
        if name.endswith("TARGET_MODULES_MAPPING") and "LORA" in name:
            known.update(LORA_TARGETS)


if find_spec("peft"):
    _tell_peft()
