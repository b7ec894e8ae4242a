"""A Transformer small enough for a test, with every weight away from its special values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdlm.core.sequence import Sequence, image_segments, text_segment
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.modeling import MmdlmForMaskedDiffusion

VOCABULARY = Vocabulary.build(text_size=23, eos_id=0, image_codes=13)
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def tiny_config(**options: Any) -> MmdlmConfig:
    """Two layers of width 32; `options` are fields of the config."""
    shape = {
        "vocabulary": VOCABULARY.to_dict(),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return MmdlmConfig(**{**shape, **options})


def tiny_model(*, seed: int = 0, **options: Any) -> MmdlmForMaskedDiffusion:
    """In eval mode; biases are not zero and norms not one, so that a test would miss neither."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MmdlmForMaskedDiffusion(tiny_config(**options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Any ids of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY.size, shape, generator=generator)


def document(text: int, codes: int, *, seed: int) -> Sequence:
    """One image of `codes` codes and one text, both targets."""
    generator = torch.Generator().manual_seed(seed)
    return Sequence(
        (
            *image_segments(
                torch.randint(VOCABULARY.image_codes, (codes,), generator=generator),
                VOCABULARY,
                target=True,
            ),
            text_segment(
                torch.randint(*VOCABULARY.text, (text,), generator=generator), target=True
            ),
        )
    )
