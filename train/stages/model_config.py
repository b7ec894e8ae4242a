"""The `model` group of each recipe that trains a denoiser: its start, and how it learns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from mmdlm.vision.encoders.adapter import VisionConfig
from train.stages.low_rank import LowRank
from train.stages.model_shape import Attention, Shape
from train.stages.param_groups import Parts

Recompute = bool | Literal["selective"]
Dtype = Literal["float32", "bfloat16", "float16"]
# Keys that recipes have no use for which train a whole model further.
OF_NEW_PARTS = ("shape", "vision", "vision_tower_weights", "parts", "quantization")


@dataclass(frozen=True)
class ModelConfig:
    """The model that a recipe trains, and how its weights are held.

    Args:
        start_from: Model to start from: a folder, a run or a step of one, a bundled name, or
            OWNER/NAME of the Hugging Face Hub; ours, of a published family, or what `mmdlm
            convert` made of an autoregressive model or an encoder.
        shape: Shape of a new Transformer with random weights, in place of `start_from`.
        text_tokenizer: Folder of a transformers tokenizer with an end-of-text token; default: the
            tokenizer of `start_from`. A new model needs one.
        image_tokenizer: Folder of the tokenizer that made the image codes, which is stored with
            the weights; default: the image tokenizer of `start_from`, if it has one.
        vision: Vision adapter of a new model, or of one to start from that has none yet.
        vision_tower_weights: Folder of transformers' SigLIP or of an open_clip model, for the
            tower of `vision`; default: random weights.
        parts: Parts of a model with a vision adapter that are frozen, and the learning rates of
            others.
        lora: Train a LoRA adapter in place of the denoiser's weights. The adapter is written to
            `out`/adapter, and merged into the weights in `out`/final.
        quantization: Hold the weights beside `lora` in fewer bits: 4bit or 8bit by bitsandbytes,
            int8 or float8 by torchao. Only `out`/adapter is written then.
        attention: Attention kernel; flex_attention for packed rows on a GPU.
        recompute: Keep only the input of each layer for the backward pass (gradient
            checkpointing): less memory, a third more time. "selective" also keeps the results of
            matrix products and of attention: less is saved, and hardly any time is lost.
        dtype: Of the weights that stay frozen; those that learn are float32.
        save_dtype: Of the final weights.
    """

    start_from: str | None = None
    shape: Shape | None = None
    text_tokenizer: Path | None = None
    image_tokenizer: Path | None = None
    vision: VisionConfig | None = None
    vision_tower_weights: Path | None = None
    parts: Parts = Parts()
    lora: LowRank | None = None
    quantization: str | None = None
    attention: Attention = "sdpa"
    recompute: Recompute = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    save_dtype: Dtype = "float32"

    def check(self, recipe: str, *, without: tuple[str, ...] = ()) -> None:
        """Raise ValueError for a model that a recipe cannot begin with.

        Args:
            recipe: Module of the recipe, for the message.
            without: Keys of this group that the recipe has no use for.
        """
        for field in fields(self):
            if field.name in without and getattr(self, field.name) != field.default:
                raise ValueError(f"model.{field.name} has no part in {recipe}; leave it out")
        if (self.start_from is None) == (self.shape is None):
            shape = "" if "shape" in without else ", or model.shape, the shape of a new one"
            both = "; both are given" if self.shape is not None else ""
            raise ValueError(f"give model.start_from, a model to start from{shape}{both}")
        if self.start_from is None and self.text_tokenizer is None:
            raise ValueError(
                "a new model has no text_tokenizer of its own; give model.text_tokenizer, the "
                "folder of one"
            )
        if self.vision is None and self.vision_tower_weights is not None:
            raise ValueError(
                f"model.vision_tower_weights is {self.vision_tower_weights}, but there is no "
                "model.vision that they are for"
            )
        if self.lora is not None and self.start_from is None:
            raise ValueError(
                "model.lora adds to weights that stay as they are; a new model has none yet"
            )
        if self.lora is not None and "denoiser" in self.parts.frozen:
            raise ValueError(
                "model.lora trains the denoiser, which model.parts.frozen names; leave one out"
            )
