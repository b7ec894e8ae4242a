"""Load a model from a name or a folder; say what is missing, damaged or does not fit."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.checkpoints.checkpoint import Checkpoint, Origin
from mmdlm.models.checkpoints.run_steps import (
    FINAL,
    RunStep,
    open_checkpoint,
    parts_of,
)
from mmdlm.models.configuration import MmdlmConfig, read_config
from mmdlm.models.encoder import MmdlmEncoder
from mmdlm.models.encoder_config import MmdlmEncoderConfig
from mmdlm.models.families.auto import family_named
from mmdlm.models.lora import Lora
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.models.quantization import check_widths, quantization_config
from mmdlm.models.special_tokens import of_text_only
from mmdlm.pipeline.devices import device_named
from mmdlm.pipeline.engine import Engine
from mmdlm.pipeline.hub import Hub
from mmdlm.pipeline.task_defaults import GENERATION, Defaults
from mmdlm.templates.auto import prompt_template_for
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.vision.checkpoint_files import reason_of
from mmdlm.vision.tokenizers.auto import load_image_tokenizer

LARGE = 10**9  # parameters, from which on the dtype that is stored is kept; bytes to show a bar for


def load_engine(
    name_or_path: str | PathLike[str] = "emoji",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quantization: Any = None,
    adapter: str | PathLike[str] | None = None,
    merge_adapter: bool = False,
    image_tokenizer: str | PathLike[str] | None = None,
    prompt_template: PromptTemplate | None = None,
    task: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Engine:
    """Load the parts of a model: of a bundled name ("emoji"), a folder, or a repository of the Hub.

    The folder of a training run stands for its final weights, or else for its newest step; one of
    its steps can be named as well: RUN/step_100. A step answers with its averaged weights, or with
    the weights themselves if the run keeps no average. A line on stderr says which one it is.

    The folder holds config.json, model.safetensors (or its shards), tokenizer_config.json with
    tokenizer.json or vocab.json and merges.txt, image_tokenizer/ for a model of ours that knows
    images, and optionally generation_config.json (see `mmdlm.pipeline.task_defaults.Defaults`).
    Code in it is never run.

    Args:
        name_or_path: What to load.
        device: Default: a CUDA GPU if there is one, or Apple's GPU (mps), else the CPU.
        dtype: Of the denoiser's computation; default: that of the weights for a published model and
            for more than a billion parameters, else float32.
        quantization: "4bit" or "8bit" (bitsandbytes), "int8", "int4" or "float8" (torchao), or a
            quantization config of transformers; the head and a vision tower keep `dtype`.
        adapter: Folder or repository of a LoRA by PEFT, trained on our names of modules or on those
            that the model was published with; its chat_template.jinja is for a model without one,
            its generation_config.json and trained_tasks.json win over what the model has.
        merge_adapter: Add the adapter to the weights, instead of computing it beside them.
        image_tokenizer: Folder or repository (OWNER/NAME, OWNER/NAME/FOLDER); default: the one in
            the model's folder, else the one that the family is published with.
        prompt_template: How documents are laid out, if not as the family usually does:
            `Mmada(attend_pads=True)`, `Lumina(editing="style")`.
        task: A method of `Model` that is wanted; a family that lacks it is refused before its
            weights are read.
        revision: Branch, tag or commit of the model's repository.
        token: Of an account of the Hub; default: the stored one.
        cache_dir: Where the Hub's files are kept; default: its usual place.
        local_files_only: Take what was downloaded before; ask nothing of the Hub.

    Returns:
        The model in evaluation mode, with tokenizers, template and defaults of generation.

    Raises:
        ValueError: If it is not found, a file is missing or damaged, a tensor is missing,
            unexpected or misshapen, the tokenizers or the adapter do not fit, or a package is
            missing.
    """
    if merge_adapter and adapter is None:
        raise ValueError("merge_adapter=True has no adapter to merge; name one: adapter=FOLDER")
    hub = Hub(revision, token, cache_dir, local_files_only)
    folder = hub.checkpoint(name_or_path)
    where = device_named(device)
    checkpoint = open_checkpoint(folder)
    lora = None if adapter is None else Lora.open(hub.part(adapter, "adapter"))
    parts = parts_of(folder)
    text_tokenizer = load_text_tokenizer(parts)
    if lora is not None and text_tokenizer.chat_template is None:
        text_tokenizer.chat_template = lora.chat_template()
    config = _read_config(checkpoint, tokenizer_size=len(text_tokenizer))
    if lora is not None:
        config.trained_tasks = lora.trained_tasks()
    prompt_template = prompt_template or prompt_template_for(
        (getattr(config, "published", None) or {}).get("family"),
        seeing=getattr(config, "vision", None) is not None,
        tasks=getattr(config, "trained_tasks", None),
    )
    if task is not None:
        prompt_template.require(task, text_tokenizer)
    defaults = Defaults.from_json(parts / GENERATION, generation=prompt_template.generation)
    if lora is not None:
        defaults = Defaults.from_json(lora.folder / GENERATION, generation=asdict(defaults))
    origin = _origin(folder, checkpoint)
    _say_which(name_or_path, folder)
    vocabulary = Vocabulary(**config.vocabulary)
    try:
        _check_mask_token(text_tokenizer, vocabulary)
    except ValueError as error:
        raise ValueError(f"{folder}: {reason_of(error)}") from error
    if image_tokenizer is not None and not vocabulary.image_codes:
        raise ValueError(
            f"{folder} has no image codes in its vocabulary; leave out image_tokenizer="
            f"{str(image_tokenizer)!r}"
        )
    denoiser = _load_denoiser(
        checkpoint, config, dtype or _default_dtype(checkpoint, config), where, quantization
    )
    if lora is not None:
        lora.onto(denoiser, merge=merge_adapter)
    images = None
    if vocabulary.image_codes:
        images = load_image_tokenizer(_find_image_tokenizer(parts, config, image_tokenizer, hub))
        images = images.to(where)
    try:
        return Engine(
            denoiser=denoiser.eval(),
            text_tokenizer=text_tokenizer,
            image_tokenizer=images,
            text_slots=config.text_slots,
            max_length=config.max_position_embeddings,
            defaults=defaults,
            device=where,
            prompt_template=prompt_template,
            origin=origin,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {reason_of(error)}") from error


def _say_which(asked: str | PathLike[str], folder: Path) -> None:
    """Say on stderr which weights of a run answer, unless its final ones were named."""
    step = RunStep.of(folder)
    if step is not None:
        kind = "averaged weights" if step.is_averaged else "weights without an average"
        print(f"answering from {folder} ({kind} of step {step.number})", file=sys.stderr)
    elif folder.name == FINAL and Path(asked).expanduser() != folder:
        print(f"answering from {folder}, the weights of the finished run", file=sys.stderr)


def _origin(folder: Path, checkpoint: Checkpoint) -> Origin:
    """Record where a model was read from, with the digests that are known already."""
    step = RunStep.of(folder)
    if step is None:
        return Origin(folder, None, dict.fromkeys(sorted(folder.rglob("*.safetensors"))))
    files: dict[Path, str | None] = dict.fromkeys(checkpoint.shards)
    files |= {folder / name: digest for name, digest in step.files.items()}
    files |= dict.fromkeys(sorted(step.setup.rglob("*.safetensors")))
    return Origin(folder, step.number, files)


def load_text_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the text tokenizer in the folder of a model; code that lies there is not run.

    Args:
        folder: Of the model.

    Returns:
        A fast tokenizer of transformers.

    Raises:
        ValueError: If a file is missing or damaged; the message names it.
    """
    folder = parts_of(folder)
    pieces = [folder / name for name in ("vocab.json", "merges.txt")]
    fast = folder / "tokenizer.json"
    # Those without tokenizer.json are Dream's, whose class is a copy of Qwen2's.
    kind = PreTrainedTokenizerFast if fast.is_file() else Qwen2Tokenizer
    if not fast.is_file() and not all(path.is_file() for path in pieces):
        raise ValueError(
            f"{fast} is missing, and there are no vocab.json and merges.txt in its place; copy or "
            "download the text tokenizer (AutoModel.from_pretrained loads a network without one; "
            "save_pretrained of what mmdlm.load returns writes all)"
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{folder / 'tokenizer_config.json'} is missing; copy or download the folder again"
        )
    with _quiet_transformers():
        tokenizer: PreTrainedTokenizerFast = _reading(
            fast if fast.is_file() else pieces[0], lambda: kind.from_pretrained(folder)
        )
    return of_text_only(tokenizer)


def _check_mask_token(tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary) -> None:
    """Refuse a tokenizer whose mask token is not the model's, if that is among the text ids."""
    mask = vocabulary.mask_id
    if not vocabulary.text[0] <= mask < vocabulary.text[1]:
        return
    if tokenizer.mask_token_id not in (None, mask):
        raise ValueError(
            f"the text tokenizer's mask token {tokenizer.mask_token!r} has id "
            f"{tokenizer.mask_token_id}, but the model's mask is id {mask}; give it the tokenizer "
            "that it was trained with"
        )
    if tokenizer.backend_tokenizer.id_to_token(mask) is None:
        raise ValueError(
            f"the text tokenizer has no mask token: none of its {len(tokenizer)} ids is the "
            f"model's mask, {mask}; give it the tokenizer that it was trained with"
        )


def _read_config(checkpoint: Checkpoint, *, tokenizer_size: int) -> PreTrainedConfig:
    """Read the config of the denoiser; ValueError names the file and what is wrong in it."""
    path, content = parts_of(checkpoint.folder) / "config.json", checkpoint.config
    kind = content.get("model_type")
    ours = kind in (MmdlmConfig.model_type, MmdlmEncoderConfig.model_type)
    if ours and not isinstance(content.get("vocabulary"), dict):
        raise ValueError(f"{path}: vocabulary is missing; mend it or download it again")
    try:
        if ours:
            Vocabulary(**content["vocabulary"])
        if kind == MmdlmEncoderConfig.model_type:
            return MmdlmEncoderConfig.from_dict(content)
        return read_config(content, tokenizer_size=tokenizer_size)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        reason = reason_of(error).replace("Vocabulary.__init__()", "vocabulary")
        raise ValueError(f"{path}: {reason.removeprefix('config.json ')}") from error


def _default_dtype(checkpoint: Checkpoint, config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype to compute in: float32 for small models of ours, however they are stored."""
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    if getattr(config, "published", None) or parameters > LARGE:
        return checkpoint.dtype
    return torch.float32


def _load_denoiser(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    where: torch.device,
    quantization: Any,
) -> PreTrainedModel:
    """Load the network to its device, with a bar on a terminal if that takes long."""
    options: dict[str, Any] = {"config": config, "dtype": dtype}
    if quantization is not None:
        if checkpoint.config.get("quantization_config"):
            raise ValueError(
                f"{checkpoint.folder} holds weights that are quantized already; leave out "
                f"quantization={quantization!r}"
            )
        check_widths(quantization, config, device=where)
        options["quantization_config"] = quantization_config(
            quantization, dtype=dtype, device=where
        )
    # Straight to where they are needed; transformers asks accelerate for that.
    if find_spec("accelerate") and (where.type != "cpu" or quantization is not None):
        options["device_map"] = str(where)
    size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    kind = MmdlmForMaskedDiffusion
    if config.model_type == MmdlmEncoderConfig.model_type:
        kind = MmdlmEncoder
    try:
        with _quiet_transformers(), _progress(checkpoint.folder.name, size) as read:
            if kind is MmdlmForMaskedDiffusion:
                options["read"] = read
            denoiser: PreTrainedModel = _reading(
                checkpoint.shards[0],
                lambda: kind.from_pretrained(checkpoint.folder, checkpoint=checkpoint, **options),
            )
            return denoiser if "device_map" in options else denoiser.to(where)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(
            f"{checkpoint.folder} does not fit into the memory of {where} in {dtype}; its files "
            f"hold {size / 1e9:.1f} GB: load it elsewhere, or with quantization='4bit'"
        ) from error


def _find_image_tokenizer(
    folder: Path, config: PreTrainedConfig, given: str | PathLike[str] | None, hub: Hub
) -> Path:
    """Find the image tokenizer: the given one, the model's own, or that of its family.

    A published family keeps it in another repository, or in a folder of its own.
    """
    if given is not None:
        return hub.part(given, "image_tokenizer")
    own = folder / "image_tokenizer"
    if own.is_dir():
        return own
    family = (getattr(config, "published", None) or {}).get("family")
    source = None if family is None else family_named(family).image_tokenizer
    if source is None:
        return own  # whose absence is said by its reader
    inside = folder.joinpath(*source.split("/")[2:])
    if inside != folder and inside.is_dir():
        return inside
    return hub.part(source, "image_tokenizer")


@contextmanager
def _progress(name: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes for large files on a terminal; yield the function that advances it."""
    shown = size >= LARGE and sys.stderr.isatty()
    lock = threading.Lock()  # several threads read
    with tqdm(
        total=size, desc=f"loading {name}", unit="B", unit_scale=True, disable=not shown
    ) as bar:

        def read(count: int) -> None:
            with lock:
                bar.update(count)

        yield read


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    """Return what `read` returns; what libraries raise on damaged files becomes one sentence."""
    try:
        return read()
    except (torch.OutOfMemoryError, MemoryError):
        raise  # nothing is wrong with the file
    except Exception as error:
        # transformers raises OSError, safetensors its own, tokenizers bare Exception
        if type(error) is ValueError and str(path.parent) in str(error):
            raise  # it says what is wrong and where
        raise ValueError(
            f"{path} is damaged or does not fit its config ({reason_of(error)}); "
            "copy or download the folder again"
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep bars and reports of transformers off the user's terminal; then restore them."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
