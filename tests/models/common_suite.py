"""transformers' own suite for models, over ours; `test_common_suite.py` runs this file.

Its tests come with the source distribution of transformers, not with what pip installs: their
folder is in the environment variable `TRANSFORMERS_TESTS`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import TestCase
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import BertConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.encoder import MmdlmEncoder
from mmdlm.models.encoder_config import MmdlmEncoderConfig
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.vision.encoders.adapter import VisionConfig
from mmdlm.vision.encoders.square import Square
from tests.models.tiny import tiny_config


def _modules() -> Iterator[tuple[str, ModuleType]]:
    """The package of the suite, and what its imports need that the distribution leaves out."""
    package = ModuleType("transformers_tests")
    package.__path__ = [os.environ["TRANSFORMERS_TESTS"]]
    yield package.__name__, package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        module = ModuleType(name)
        setattr(module, mixin, type(mixin, (), {}))
        yield f"{package.__name__}.{name.split('.')[0]}", ModuleType(name.split(".")[0])
        yield f"{package.__name__}.{name}", module


sys.modules.update(_modules())

from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402

# The suite finds what a class is for by its name.
MODEL_FOR_MASKED_LM_MAPPING_NAMES["mmdlm"] = "MmdlmForMaskedDiffusion"
MODEL_FOR_MASKED_LM_MAPPING_NAMES["mmdlm_encoder"] = "MmdlmEncoder"
BATCH, LENGTH = 2, 7
VISION = VisionConfig(
    tower={
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    },
    tiling=Square(size=8, grid=2),
)
# Text is last, as in most published vocabularies: the suite looks for new rows at the end.
VOCABULARY = Vocabulary(size=40, text=(0, 40), image=(40, 40), mask_id=2, pad_id=1, eos_id=0)


class TextTester:
    """What the suite asks for: a small config, and inputs that fit it."""

    batch_size, seq_length = BATCH, LENGTH
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_training = True

    def __init__(self, parent: TestCase) -> None:
        self.parent = parent

    def get_config(self) -> PreTrainedConfig:
        return tiny_config(
            vocabulary=VOCABULARY.to_dict(),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        config = self.get_config()
        ids = torch.randint(3, 20, (self.batch_size, self.seq_length))
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TextSuite(ModelTesterMixin, TestCase):  # type: ignore[misc]
    all_model_classes: tuple[type[PreTrainedModel], ...] = (MmdlmForMaskedDiffusion,)
    make: type[Any] = TextTester

    def setUp(self) -> None:
        self.model_tester = self.make(self)

    def test_inputs_embeds_matches_input_ids(self) -> None:
        with self.as_a_body():
            super().test_inputs_embeds_matches_input_ids()

    def test_model_forward_default_config_values(self) -> None:
        with self.as_a_body():
            super().test_model_forward_default_config_values()

    def test_model_weights_reload_no_missing_tied_weights(self) -> None:
        # The test writes over weights, which the record of their digests would tell.
        with (
            patch("mmdlm.models.modeling.check_digests"),
            patch("mmdlm.models.encoder.check_digests"),
        ):
            super().test_model_weights_reload_no_missing_tied_weights()

    def as_a_body(self) -> Any:
        """Have the suite run what it runs for bodies only."""
        return patch.dict(MODEL_MAPPING_NAMES, ours=self.all_model_classes[0].__name__)


class SeeingTester(TextTester):
    """A model that sees: an image of 4 slots before the text of each row."""

    batch_size = 7  # the suite fills up smaller ones with random numbers, image sizes too

    def get_config(self) -> PreTrainedConfig:
        config = super().get_config()
        config.vision = VISION.to_dict()
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        slots = torch.zeros_like(inputs["input_ids"])
        slots[:, :4] = 1
        inputs["mm_token_type_ids"] = slots
        inputs["pixel_values"] = torch.rand(self.batch_size, 3, 8, 8)
        inputs["image_sizes"] = torch.tensor([[8, 8]] * self.batch_size)
        return config, inputs


class SeeingSuite(TextSuite):
    make = SeeingTester
    additional_model_inputs = ("mm_token_type_ids", "pixel_values", "image_sizes")

    def test_sdpa_can_dispatch_non_composite_models(self) -> None:
        self.skipTest("a vision tower keeps its own kernel, whatever the language model's is")


class EncoderTester(TextTester):
    """A published encoder as a denoiser."""

    def get_config(self) -> PreTrainedConfig:
        encoder = BertConfig(
            vocab_size=VOCABULARY.size,
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=64,
            pad_token_id=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return MmdlmEncoderConfig(vocabulary=VOCABULARY.to_dict(), encoder=encoder.to_dict())


class EncoderSuite(TextSuite):
    all_model_classes = (MmdlmEncoder,)
    make = EncoderTester
