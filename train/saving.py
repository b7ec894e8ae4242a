"""What a run writes for others to ask: the setup of its steps, an adapter, its final weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmdlm.models.auto import PretrainedDenoiser
from mmdlm.models.checkpoints.run_steps import Base
from mmdlm.models.lora import TASKS, TEMPLATE
from mmdlm.models.quantization import is_quantized
from mmdlm.models.special_tokens import with_special_tokens
from mmdlm.pipeline.task_defaults import GENERATION
from mmdlm.templates.prompt_template import Generation
from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from train.checkpoints.checkpoint import replace_folder
from train.stages.low_rank import Adapted
from train.stages.model_config import Dtype


def setup_of(
    denoiser: PretrainedDenoiser,
    words: PreTrainedTokenizerFast,
    image_tokenizer: Path | None,
    *,
    generation: Generation | None = None,
    adapted: Adapted | None = None,
    base: tuple[str, Path] | None = None,
) -> Callable[[Path], None]:
    """Return what fills a folder with all that the weights of a run's steps are asked with.

    Args:
        denoiser: Its config is written, and which of its weights are not trained.
        words: The text tokenizer, with its chat template.
        image_tokenizer: Folder of the image tokenizer, if any.
        generation: What is written as generation_config.json.
        adapted: The denoiser with matrices of low rank in it, where it has any.
        base: Name and folder of the model that the run starts from; None: it starts from nothing.

    Returns:
        A function of the folder.
    """

    def write(folder: Path) -> None:
        config = copy.deepcopy(denoiser.config)
        if hasattr(
            config, "quantization_config"
        ):  # of this run; steps are asked over whole weights
            del config.quantization_config
        config.save_pretrained(folder)
        named = with_special_tokens(words, denoiser.vocabulary)
        _write_parts(folder, named, image_tokenizer, generation)
        frozen = [
            name.replace(".base_layer.", ".")
            for name, parameter in denoiser.named_parameters()
            if not parameter.requires_grad
        ]
        if frozen:
            scale = None if adapted is None else adapted.low_rank.scale
            name, place = base or ("", None)
            Base.of(name, place, frozen=frozen, scale=scale).write(folder)

    return write


def _write_parts(
    folder: Path,
    words: PreTrainedTokenizerFast,
    image_tokenizer: Path | None,
    generation: Generation | None,
) -> None:
    """Write what a model has beside its weights and their config."""
    words.save_pretrained(folder)
    if image_tokenizer is not None:
        load_image_tokenizer(image_tokenizer).save_pretrained(folder / "image_tokenizer")
    _write_generation(folder, generation)


def _write_generation(folder: Path, generation: Generation | None) -> None:
    if generation:
        (folder / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")


def save(
    denoiser: PretrainedDenoiser,
    weights: dict[str, Tensor],
    words: PreTrainedTokenizerFast,
    image_tokenizer: Path | None,
    folder: Path,
    *,
    dtype: str = "float32",
    generation: Generation | None = None,
) -> None:
    """Write all that `mmdlm.load` needs, beside and then renamed."""

    def write(part: Path) -> None:
        rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
        denoiser.save_pretrained(part, state_dict=rounded)
        named = with_special_tokens(words, denoiser.vocabulary)
        _write_parts(part, named, image_tokenizer, generation)

    replace_folder(folder, write)


def finish(
    denoiser: PretrainedDenoiser,
    trained: dict[str, Tensor],
    words: PreTrainedTokenizerFast,
    image_tokenizer: Path | None,
    out: Path,
    *,
    adapted: Adapted | None = None,
    base: str = "",
    dtype: Dtype = "float32",
    generation: Generation | None = None,
) -> None:
    """Write what a stage has learned to `out`/final, and matrices of low rank to `out`/adapter.

    Beside a quantized base the matrices are all that is written: added to it they would be rounded.

    Args:
        denoiser: That was trained.
        trained: State dict of a stage whose denoiser is called so.
        words: The text tokenizer, with its chat template.
        image_tokenizer: Folder of the image tokenizer, if any.
        out: Folder of the run.
        adapted: The denoiser with the matrices in it, where it has any.
        base: Name of the model that they belong to.
        dtype: Of the weights in `out`/final.
        generation: What `out`/final and `out`/adapter hold as generation_config.json.
    """
    weights = {name.removeprefix("denoiser."): value for name, value in trained.items()}
    if adapted is not None:
        if adapted.is_all_that_learns:
            own, matrices = adapted, weights

            def write(folder: Path) -> None:
                own.save(matrices, folder, base=base)
                if isinstance(words.chat_template, str):  # for a base that has none
                    (folder / TEMPLATE).write_text(words.chat_template, encoding="utf-8")
                _write_generation(folder, generation)
                if denoiser.config.trained_tasks is not None:
                    text = json.dumps(list(denoiser.config.trained_tasks)) + "\n"
                    (folder / TASKS).write_text(text, encoding="utf-8")

            replace_folder(out / "adapter", write)
            print(f"adapter alone: {out / 'adapter'}")
        if any(map(is_quantized, denoiser.parameters())):
            return
        weights = adapted.merged(weights)
        adapted.remove()
    final = out / "final"
    save(denoiser, weights, words, image_tokenizer, final, dtype=dtype, generation=generation)
    print(f"trained weights: {final}")
