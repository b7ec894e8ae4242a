"""The model that a recipe starts with: read or new, with what of it learns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedTokenizerFast

from data_pipelines.room import bytes_of, check_room
from mmdlm.models.auto import PretrainedDenoiser, load_denoiser
from mmdlm.models.checkpoints.run_steps import parts_of
from mmdlm.models.configuration import read_config
from mmdlm.models.encoder_config import MmdlmEncoderConfig
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.pipeline.hub import find_checkpoint
from mmdlm.pipeline.loading import load_text_tokenizer
from mmdlm.templates.text_codec import TextCodec
from mmdlm.vision.checkpoint_files import read_json
from mmdlm.vision.encoders.adapter import VisionAdapter, VisionConfig
from mmdlm.vision.encoders.tower_weights import load_tower
from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from mmdlm.vision.tokenizers.base import ImageTokenizer
from train.quantized import FrozenBase, check_adapter_is_all, check_base
from train.stages.denoising import prompt_template_for_denoiser
from train.stages.low_rank import Adapted
from train.stages.model_config import ModelConfig, Recompute
from train.stages.model_shape import Attention

PRODUCTS = ("mm", "addmm", "bmm", "_linear_pointwise", "flex_attention")


@dataclass(frozen=True)
class StartedModel:
    """A denoiser before training, and what belongs to it.

    Attributes:
        denoiser: New, or with the weights of `folder`.
        text_tokenizer: As it was given, or else that of `folder`.
        images: Image tokenizer; None for a model without image codes.
        image_tokenizer: Folder of `images`.
        folder: Of the model that is started from; None for a new one.
    """

    denoiser: PretrainedDenoiser
    text_tokenizer: PreTrainedTokenizerFast
    images: ImageTokenizer | None
    image_tokenizer: Path | None
    folder: Path | None


def start_model(
    model: ModelConfig, *, seed: int, device: torch.device, needs_images: bool = False
) -> StartedModel:
    """Read the model that a recipe starts from, or make a new one.

    Args:
        model: Which one; it was checked, see `ModelConfig.check`.
        seed: Of the random weights of a new model.
        device: That the run trains on; only quantized weights are placed there.
        needs_images: Whether a model of image codes needs its image tokenizer.

    Returns:
        The denoiser and what belongs to it.

    Raises:
        ValueError: Something is missing, damaged, or does not belong together.
    """
    check_base(
        model.quantization,
        starts=model.start_from is not None,
        adapts=model.lora is not None,
        sees=model.vision is not None,
    )
    folder = None if model.start_from is None else find_checkpoint(model.start_from)
    of_text = model.text_tokenizer or folder
    assert of_text is not None, "a checked model has one of them"
    text_tokenizer = load_text_tokenizer(of_text)
    image_tokenizer = image_tokenizer_of(folder, model.image_tokenizer)
    images = load_image_tokenizer(image_tokenizer) if image_tokenizer else None
    denoiser: PretrainedDenoiser
    if folder is None:
        assert model.shape is not None, "a checked model has one of them"
        denoiser = model.shape.build(text_tokenizer, images, seed=seed, attention=model.attention)
    else:
        denoiser = start(
            folder,
            text_tokenizer,
            images,
            attention=model.attention,
            dtype=getattr(torch, model.dtype),
            needs_images=needs_images,
            base=None if model.lora is None else FrozenBase(model.quantization, device),
        )
    return StartedModel(denoiser, text_tokenizer, images, image_tokenizer, folder)


def make_trainable(
    denoiser: PretrainedDenoiser, model: ModelConfig, *, seed: int, train_vision: bool = True
) -> Adapted | None:
    """Add the vision adapter and the LoRA adapter that are asked for, and freeze what is frozen.

    Args:
        denoiser: Changed in place.
        model: What is added, frozen and computed again.
        seed: Of new weights.
        train_vision: Whether the vision adapter may learn; otherwise it is frozen as a whole.

    Returns:
        The denoiser with a LoRA adapter; None without one.

    Raises:
        ValueError: The denoiser has no place for what is added.
    """
    if model.vision is not None:
        add_vision_adapter(denoiser, model.vision, model.vision_tower_weights, seed=seed)
    if train_vision:
        model.parts.freeze(denoiser)
    elif (adapter := getattr(denoiser, "vision", None)) is not None:
        adapter.requires_grad_(False)
    adapted = None
    if model.lora is not None:
        adapted = model.lora.onto(denoiser, seed=seed)
        check_adapter_is_all(adapted, denoiser)
    learn_in_float32(denoiser)
    recompute_layers(denoiser, model.recompute)
    return adapted


def start(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageTokenizer | None,
    *,
    attention: Attention,
    dtype: torch.dtype = torch.float32,
    needs_images: bool = True,
    base: FrozenBase | None = None,
) -> PretrainedDenoiser:
    """Return the denoiser of a folder, ours or of a published family, to be trained further.

    Args:
        folder: Of the model.
        tokenizer: Of the text, as the run has it.
        images: The image tokenizer, if the run has one.
        attention: Implementation of attention.
        dtype: Of its weights, whatever was stored; in half precision small steps are lost.
        needs_images: Whether a model of image codes needs their tokenizer.
        base: For weights that stay as they are, beside an adapter: they may be quantized.

    Returns:
        The denoiser, its weights in `dtype`.

    Raises:
        ValueError: Where it is missing, damaged, or was trained with other tokenizers.
    """
    parts = parts_of(folder)
    if not (parts / "config.json").is_file():
        raise ValueError(f"model.start_from {folder}: no config.json there; correct the path")
    if attention == "flex_attention" and not torch.cuda.is_available():
        raise ValueError(
            "model.attention flex_attention trains only on a GPU, and there is none; take sdpa"
        )
    options = {"attn_implementation": attention, "dtype": dtype}
    content = read_json(parts / "config.json")
    if isinstance(content, dict) and content.get("model_type") != MmdlmEncoderConfig.model_type:
        options["config"] = read_config(content, tokenizer_size=len(tokenizer))
    if isinstance(content, dict) and content.get("quantization_config"):
        raise ValueError(
            f"model.start_from {folder} holds quantized weights, which have no gradient; start "
            "from the weights that they were made of (train.sft can quantize those beside "
            "`model.lora`)"
        )
    if base is not None:
        options |= base.options(options.get("config"), dtype=dtype)
    denoiser = load_denoiser(folder, **options)
    known = denoiser.vocabulary
    codes = images.codebook_size if images is not None else 0
    if images is None and not needs_images:
        codes = known.image_codes
    size = known.text[1] - known.text[0]
    if known.text[0] <= known.mask_id < known.text[1]:
        size = min(size, len(tokenizer))  # published embeddings have rows to spare
    ends = {
        known.eos_id,
        *prompt_template_for_denoiser(denoiser).stop_ids(TextCodec(tokenizer, known)),
    }
    eos = tokenizer.eos_token_id
    right = eos is not None and eos + known.text[0] in ends
    if (len(tokenizer), codes) != (size, known.image_codes) or not right:
        raise ValueError(
            f"{folder} has another vocabulary, {known}, than the tokenizers given, with "
            f"{len(tokenizer)} text ids, end of text {eos} and {codes} image codes; "
            "give those that it was trained with"
        )
    return denoiser


def add_vision_adapter(
    denoiser: PretrainedDenoiser, vision: VisionConfig, tower_weights: Path | None, *, seed: int
) -> None:
    """Give a model that does not see a vision adapter, whose projector is new.

    One that sees may be given another tiling: LLaVA's projector is first trained on squares, then
    on mosaics. It keeps its tower and its projector.
    """
    if not isinstance(denoiser, MmdlmForMaskedDiffusion):
        raise ValueError("vision: an encoder of text takes no images; start from another model")
    before = denoiser.vision
    if before is not None:
        _check_same_eyes(before.config, vision, tower_weights)
    weights = bytes_of(lambda: VisionAdapter(vision, denoiser.config.hidden_size))
    check_room("vision", {"weights": weights}, mend="its tower")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = VisionAdapter(vision, denoiser.config.hidden_size)
        if tower_weights is not None:
            load_tower(adapter.tower, tower_weights)
    if before is not None:
        kept = {name: t for name, t in before.state_dict().items() if name in adapter.state_dict()}
        adapter.load_state_dict(kept, strict=False)  # without newline a new one is drawn
    denoiser.vision = adapter
    denoiser.config.vision = vision.to_dict()


def _check_same_eyes(
    before: VisionConfig, vision: VisionConfig, tower_weights: Path | None
) -> None:
    """ValueError where more than the tiling would become another."""
    old, new = before.to_dict(), vision.to_dict()
    differing = [name for name in old if old[name] != new[name] and name != "tiling"]
    if tower_weights is not None:
        differing.append("vision_tower_weights")
    if differing or old == new:
        raise ValueError(
            "vision: the model to start from sees already, with an adapter of its own; leave "
            f"`vision` out, or give it only another tiling (here {', '.join(differing) or 'none'} "
            "would be another)"
        )


def image_tokenizer_of(folder: Path | None, given: Path | None) -> Path | None:
    """Return the folder of an image tokenizer: the given one, or that of the model in `folder`."""
    own = None if folder is None else parts_of(folder) / "image_tokenizer"
    return own if given is None and own is not None and own.is_dir() else given


def learn_in_float32(denoiser: nn.Module) -> None:
    """Weights that learn are float32, whatever those are that stay frozen."""
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def recompute_layers(denoiser: PretrainedDenoiser, recompute: Recompute) -> None:
    """Compute again in the backward pass what is cheap to keep no memory for (checkpointing).

    True keeps only the input of each layer; "selective" the results of matrix products and of
    attention besides, so that no product is computed twice. Where layers are compiled, the compiler
    chooses within them: products may be computed again.
    """
    if not recompute:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if recompute == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept)
    enable = getattr(denoiser, "activation_checkpointing_enable", None)  # its newer name
    (enable or denoiser.gradient_checkpointing_enable)(options)


def _kept(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name().split("::")[-1]
    dear = name in PRODUCTS or name.startswith("_scaled_dot_product")
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
