"""The Transformer, and one file per published family.

Importing it tells transformers' Auto classes about all of them, so that no remote code is needed:

>>> import mmdlm.models
>>> from transformers import AutoModel
>>> model = AutoModel.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", dtype="auto")
"""

from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.encoder import MmdlmEncoder
from mmdlm.models.encoder_config import MmdlmEncoderConfig
from mmdlm.models.modeling import MmdlmForMaskedDiffusion

__all__ = ["MmdlmConfig", "MmdlmEncoder", "MmdlmEncoderConfig", "MmdlmForMaskedDiffusion"]
