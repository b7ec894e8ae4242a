"""From an autoregressive model or an encoder to a denoiser, before any training.

The weights stay what they were. What changes is the config, which from now on means attention to
both sides, and the vocabulary, which gets a mask token and, optionally, image codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mmdlm.atomic_files import atomic_folder
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.checkpoints.autoregressive import AUTOREGRESSIVE, shape_of_autoregressive
from mmdlm.models.checkpoints.checkpoint import Checkpoint, local_folder
from mmdlm.models.checkpoints.grown_vocabulary import (
    MASK_TOKEN,
    Growth,
    give_mask,
    load_source_tokenizer,
)
from mmdlm.models.configuration import MmdlmConfig
from mmdlm.models.encoder import MmdlmEncoder
from mmdlm.models.encoder_config import ENCODERS, MmdlmEncoderConfig
from mmdlm.models.families.base import Json, required
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.models.special_tokens import with_special_tokens

ONLY_TEXT = ("infill", "complete")  # what such a model was trained for
# What a checkpoint may hold beyond the model: buffers, and heads of other tasks.
NOT_NEEDED = re.compile(
    r".*\.position_ids|.*\.rotary_emb\.inv_freq|.*\.pooler\..*|cls\.seq_relationship\..*"
)


def convert_to_diffusion(
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    mask_token: str = MASK_TOKEN,
    shift: bool = True,
    image_codes: int = 0,
    block_length: int | None = None,
    seed: int = 0,
) -> Iterator[tuple[int, int]]:
    """Write an autoregressive model or an encoder as a denoiser -> (shards written, shards).

    A new mask takes the first free row where the embedding has more rows than the tokenizer ids (as
    Dream's does), and is left as it is. Otherwise embedding and head grow by one row, the mean of
    the others. Rows for images are that mean with a tenth of the others' spread. All else is copied
    bit for bit, in its dtype, with one shard in memory at a time.

    Args:
        source: A folder or a repository of the Hugging Face Hub, with safetensors and a tokenizer.
        out: A folder that does not exist yet; it appears whole or not at all.
        mask_token: What the tokenizer gets as its mask, unless it has one; a token that it knows is
            taken over.
        shift: Each state goes on predicting the next token, as Dream's do; False is refused for
            encoders, whose states predict their own.
        image_codes: Ids of an image tokenizer, appended with a begin and an end marker.
        block_length: Block diffusion in blocks of so many tokens, each of which sees itself and
            those before it (arXiv:2510.06303, SDAR, without shift; arXiv:2509.26328, Fast-dLLM v2,
            with shift); refused for encoders. None: every token sees all.
        seed: Of the noise in rows that are appended for images.

    Yields:
        (shards written, shards) after each.

    Source: arXiv:2508.15487, section 3 (weights and shift of Qwen2.5 are kept).

    Raises ValueError for a model or an option that is not known here, a tokenizer without an end of
    text, and tensors that do not fit config.json.
    """
    checkpoint = Checkpoint.open(local_folder(source))
    out = Path(out)
    if image_codes < 0:
        raise ValueError(f"image_codes is {image_codes}; it must be 0 or more")
    _check_kind(checkpoint)
    tokenizer = load_source_tokenizer(checkpoint.folder)
    rows = int(required(checkpoint.config, "vocab_size"))
    vocabulary = give_mask(tokenizer, rows, mask_token=mask_token, image_codes=image_codes)
    config, model = _denoiser(checkpoint, vocabulary, shift=shift, block_length=block_length)
    plan = _plan(checkpoint, model)

    growth = Growth(vocabulary.mask_id + 1, torch.Generator().manual_seed(seed))

    def grown(name: str, tensor: Tensor) -> Tensor:
        return growth(tensor, plan.shapes[name][0])

    with atomic_folder(out, replace=False) as part:
        yield from checkpoint.rewrite(
            part, names=plan.names, change=grown, metadata={"format": "pt"}
        )
        config.architectures = [type(model).__name__]
        config.save_pretrained(part)
        with_special_tokens(tokenizer, vocabulary).save_pretrained(part)


def _denoiser(
    checkpoint: Checkpoint, vocabulary: Vocabulary, *, shift: bool, block_length: int | None
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """Our config, and the model that it describes, without weights."""
    source = checkpoint.config
    kind = source.get("model_type")
    config: PreTrainedConfig
    with torch.device("meta"):
        if kind in AUTOREGRESSIVE:
            shape = shape_of_autoregressive(source)
            config = MmdlmConfig(
                vocabulary=vocabulary.to_dict(), shift=shift, block_length=block_length, **shape
            )
            return _stored(config, source), MmdlmForMaskedDiffusion(config)
        if block_length is not None:
            raise ValueError(
                f"block_length={block_length} is for autoregressive models, not for one of type "
                f"{kind!r}, whose tokens see both sides; leave it out"
            )
        if not shift:
            raise ValueError(
                f"shift=False has no meaning for a model of type {kind!r}, whose states predict "
                "their own tokens already; leave it out"
            )
        encoder = {k: v for k, v in source.items() if k not in ("dtype", "torch_dtype")}
        encoder["vocab_size"] = vocabulary.size
        config = MmdlmEncoderConfig(vocabulary=vocabulary.to_dict(), encoder=encoder)
        return _stored(config, source), MmdlmEncoder(config)


def _check_kind(checkpoint: Checkpoint) -> None:
    kind = checkpoint.config.get("model_type")
    if kind not in (*AUTOREGRESSIVE, *ENCODERS):
        raise ValueError(
            f"{checkpoint.folder}: a model of type {kind!r} cannot become a denoiser, unless it is "
            f"one already; known are {', '.join((*AUTOREGRESSIVE, *ENCODERS))}"
        )


def _stored(config: PreTrainedConfig, source: Json) -> PreTrainedConfig:
    config.trained_tasks = list(ONLY_TEXT)
    config.dtype = source.get("dtype") or source.get("torch_dtype")
    return config


@dataclass(frozen=True)
class _Plan:
    """Which tensors are copied.

    Attributes:
        names: Their names -> ours, of the tensors to be copied.
        shapes: Shapes of our tensors.
    """

    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def _plan(checkpoint: Checkpoint, model: PreTrainedModel) -> _Plan:
    """Which tensors go where; ValueError where the checkpoint does not fit its config.json."""
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied
    }
    prefix = "encoder." if isinstance(model, MmdlmEncoder) else ""
    names: dict[str, str] = {}
    strange = []
    for theirs, shape in checkpoint.shapes.items():
        ours = prefix + re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", theirs)
        ours = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", ours)  # BERT's first names
        if ours in shapes:
            _check_shape(theirs, shape, shapes[ours], rows=checkpoint.config["vocab_size"])
            names[theirs] = ours
        elif ours in tied:
            _check_tied(checkpoint, theirs, tied[ours].removeprefix(prefix))
        elif not NOT_NEEDED.fullmatch(theirs):
            strange.append(theirs)
    lost = sorted(shapes.keys() - set(names.values()))
    for what, listed in (("lacks", lost), ("has beyond the model", sorted(strange))):
        if listed:
            raise ValueError(
                f"{checkpoint.folder} {what} {len(listed)} tensors "
                f"({', '.join(name.removeprefix(prefix) for name in listed[:5])}); it does not fit "
                "its config.json"
            )
    return _Plan(names=names, shapes=shapes)


def _check_shape(name: str, theirs: tuple[int, ...], ours: tuple[int, ...], *, rows: int) -> None:
    """Return the same shape, or one with a row for each id of their smaller vocabulary."""
    if theirs != ours and (theirs[:1] != (rows,) or theirs[1:] != ours[1:] or ours[0] < rows):
        raise ValueError(
            f"tensor {name} is of shape {theirs}, which does not fit config.json ({ours})"
        )


def _check_tied(checkpoint: Checkpoint, name: str, other: str) -> None:
    """Check that two tensors are equal that the config calls the same."""
    found: dict[str, Any] = {}
    for shard in checkpoint.shards:
        with safe_open(shard, framework="pt") as file:
            for key in {name, other} & set(file.keys()):
                found[key] = file.get_tensor(key)
    if other in found and not torch.equal(found[name], found[other]):
        raise ValueError(
            f"{checkpoint.folder}: config.json says tie_word_embeddings, but {name} and {other} "
            "differ; set it to false"
        )
