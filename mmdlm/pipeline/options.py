"""Name the keyword arguments that several tasks of a model share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, TypedDict

import torch

from mmdlm.core.sampling.generators import Generators
from mmdlm.templates.prompt_template import PromptTemplate, Tool
from mmdlm.vision.known_names import suggestion


class LoadOptions(TypedDict, total=False):
    """Options of loading a model; see `mmdlm.pipeline.loading.load_engine`.

    Attributes:
        device: Where its tensors are put.
        dtype: Of the denoiser's computation.
        quantization: Weights in fewer bits.
        adapter: A LoRA.
        merge_adapter: Add the adapter to the weights.
        image_tokenizer: Its image tokenizer.
        prompt_template: How documents are laid out.
        task: A method of `Model` that is wanted.
        revision: Branch, tag or commit of the model's repository.
        token: Of an account of the Hub.
        cache_dir: Where the Hub's files are kept.
        local_files_only: Ask nothing of the Hub.
    """

    device: torch.device | str | None
    dtype: torch.dtype | None
    quantization: Any
    adapter: str | PathLike[str] | None
    merge_adapter: bool
    image_tokenizer: str | PathLike[str] | None
    prompt_template: PromptTemplate | None
    task: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | PathLike[str] | None
    local_files_only: bool


class SamplingOptions(TypedDict, total=False):
    """Values of `GenerationConfig` that a call may give; None leaves the model's own.

    Attributes:
        num_inference_steps: Denoising steps.
        block_length: Write left to right, so many tokens at a time.
        temperature: Of the draw of tokens; 0 takes the most likely one.
        guidance_scale: How strongly to follow the prompt; 1 is off.
    """

    num_inference_steps: int | None
    block_length: int | None
    temperature: float | None
    guidance_scale: float | None


class StepOptions(TypedDict, total=False):
    """Options of tasks that follow the model's own sampling but for its steps.

    Attributes:
        num_inference_steps: Denoising steps.
        generator: Random numbers, or a list of one generator for each output.
    """

    num_inference_steps: int | None
    generator: Generators | None


class TextOptions(SamplingOptions, total=False):
    """Options of tasks that write a text.

    Attributes:
        max_new_tokens: Room for the text, in tokens; what follows its end is dropped.
        stop: A text, or several: what is written ends before the first of them.
        generator: Random numbers, or a list of one generator for each output.
    """

    max_new_tokens: int | None
    stop: str | Sequence[str] | None
    generator: Generators | None


class ChatOptions(TextOptions, total=False):
    """Options of tasks that answer.

    Attributes:
        think: Give reasons first, or not, where the model was trained for either; None: as the
            conversation has it.
        tools: What the assistant may call, as transformers takes them: JSON schemas, or functions
            with docstrings. The tokenizer's chat template writes them, if it knows tools.
    """

    think: bool | None
    tools: Sequence[Tool] | None


class ImageOptions(TypedDict, total=False):
    """Options of drawing.

    Attributes:
        num_inference_steps: Denoising steps.
        guidance_scale: How strongly to follow the prompt; 1 is off.
        negative_prompt: What to stay away from, one for all prompts or one for each: it takes the
            place of the absent prompt in guidance; None or "": no words at all.
        num_images_per_prompt: Images of each prompt; default: 1.
        height: In pixels, for a model that draws in several sizes; None: its own.
        width: The same.
        think: First write what is to be drawn, where the model was trained to.
        generator: Random numbers, or a list of one generator for each image.
    """

    num_inference_steps: int | None
    guidance_scale: float | None
    negative_prompt: str | Sequence[str] | None
    num_images_per_prompt: int
    height: int | None
    width: int | None
    think: bool
    generator: Generators | None


def check_options(given: Mapping[str, Any], kind: Any, *, task: str) -> None:
    """Refuse a keyword argument that a task does not take.

    Args:
        given: Keyword arguments of a call.
        kind: The TypedDict that names them.
        task: Name of the called method.

    Raises:
        TypeError: If one is unknown; the message names the nearest known one.
    """
    known = sorted(kind.__optional_keys__)
    for name in given:
        if name not in known:
            hint = suggestion(name, known) or f"; known are {', '.join(known)}"
            raise TypeError(f"{task}() got an unexpected keyword argument {name!r}{hint}")


def sampling_options(given: Mapping[str, Any]) -> SamplingOptions:
    """Return those of a call's keyword arguments that a `GenerationConfig` has."""
    names = SamplingOptions.__optional_keys__
    chosen: SamplingOptions = {name: given[name] for name in given if name in names}  # type: ignore[assignment]
    return chosen
