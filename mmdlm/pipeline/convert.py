"""Convert a checkpoint from one format to another: published families, and our own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mmdlm.atomic_files import atomic_folder
from mmdlm.models.checkpoints.checkpoint import INDEX, WEIGHTS, Checkpoint
from mmdlm.models.checkpoints.run_steps import RunStep
from mmdlm.models.configuration import MmdlmConfig, read_config
from mmdlm.models.encoder_config import MmdlmEncoderConfig
from mmdlm.models.families.auto import family_named, family_of
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.pipeline.hub import find_checkpoint
from mmdlm.pipeline.loading import load_text_tokenizer
from mmdlm.vision.checkpoint_files import check_stays
from mmdlm.vision.digests import FILE as DIGESTS
from mmdlm.vision.digests import write_digests

OURS = MmdlmConfig.model_type
# Fields of `MmdlmConfig`, beside the vocabulary, that change what a model computes.
COMPUTED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_sections",
    "rms_norm_eps",
    "attention_bias",
    "qk_norm",
    "tie_word_embeddings",
    "shift",
    "block_length",
    "prompt_blocks",
)


def convert(
    source: str | PathLike[str], out: str | PathLike[str], *, to: str = OURS
) -> Iterator[tuple[int, int]]:
    """Write a checkpoint in another format; yield (shards written, shards) after each.

    Tensors are copied bit for bit, one shard at a time; what else lies in the folder is copied too.
    There and back gives the same tensors and the same config.json.

    Args:
        source: A folder, a bundled name or a repository of the Hugging Face Hub, ours or published.
        out: A folder that does not exist yet; it appears whole or not at all.
        to: "mmdlm", or the family to write: "llada", "mmada", "dream", ...

    Yields:
        (shards written, shards) after each.

    Raises:
        ValueError: For a folder that cannot be read, an `out` that exists, and a model that the
            family cannot express.
    """
    folder = find_checkpoint(source)
    if RunStep.of(folder) is not None:
        raise ValueError(
            f"{folder} is a step of a run; write it as a folder of its own, which can be converted:"
            f' python -c "import mmdlm; mmdlm.load({str(folder)!r}).save_pretrained(FOLDER)"'
        )
    checkpoint = Checkpoint.open(folder)
    out = Path(out)
    if out.resolve().is_relative_to(checkpoint.folder.resolve()):
        raise ValueError(f"{out} lies in {checkpoint.folder}, which is copied; name another place")
    if checkpoint.config.get("model_type") == MmdlmEncoderConfig.model_type:
        raise ValueError(f"{checkpoint.folder} is an encoder in our format, and there is no other")
    config, names = _to_ours(checkpoint) if to == OURS else _to_published(checkpoint, to)
    with atomic_folder(out, replace=False) as part:
        yield from checkpoint.rewrite(part, names=names)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _copy_the_rest(checkpoint, part)
        if to == OURS:
            write_digests(part)


def _to_ours(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, str]]:
    """Return our config.json and the names of the tensors here."""
    if checkpoint.config.get("model_type") == OURS:
        return checkpoint.config, {name: name for name in checkpoint.shapes}
    family = family_of(checkpoint.config, checkpoint.shapes)
    tokenizer_size = None
    if (checkpoint.folder / "tokenizer_config.json").is_file():
        tokenizer_size = len(load_text_tokenizer(checkpoint.folder))
    config = read_config(checkpoint.config, tokenizer_size=tokenizer_size)
    config.architectures = [MmdlmForMaskedDiffusion.__name__]
    return json.loads(config.to_json_string()), family.weights.rename(checkpoint.shapes)


def _to_published(checkpoint: Checkpoint, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the config.json and the names of the tensors in a family's format."""
    family = family_named(name)
    if checkpoint.config.get("model_type") != OURS:
        raise ValueError(
            f"{checkpoint.folder} is no checkpoint of ours but of type "
            f"{checkpoint.config.get('model_type')!r}; convert it to {OURS} first"
        )
    config = read_config(checkpoint.config)
    back = family.weights.reversed
    unknown = sorted(tensor for tensor in checkpoint.shapes if back(tensor) is None)
    if unknown:
        raise ValueError(
            f"{name} has no place for {len(unknown)} of {len(checkpoint.shapes)} tensors: "
            f"{', '.join(unknown[:5])}"
        )
    return _published_config(config, family_name=name), back.rename(checkpoint.shapes)


def _published_config(config: MmdlmConfig, *, family_name: str) -> dict[str, Any]:
    """Return the config.json that the weights came with, unless the model has changed since.

    Raises:
        ValueError: If what is written would be read as another model.
    """
    record = config.published or {}
    if record.get("family") == family_name and not _misread(record["config"], config):
        return dict(record["config"])
    written = family_named(family_name).published_config(config.to_dict())
    if misread := _misread(written, config):
        name, (ours, theirs) = next(iter(misread.items()))
        raise ValueError(
            f"{family_name} cannot say {name} = {ours!r}, and would be read with {theirs!r}; keep "
            "the model in our format, or choose another family"
        )
    return written


def _misread(written: dict[str, Any], config: MmdlmConfig) -> dict[str, tuple[Any, Any]]:
    """Find where a family's config.json describes another model: (ours, as it is read)."""
    words = config.vocabulary or {}
    ours = _computed(config)
    theirs = _computed(read_config(written, tokenizer_size=words["text"][1]))
    both = {name: (ours.get(name), theirs.get(name)) for name in ours | theirs}
    return {name: (mine, read) for name, (mine, read) in both.items() if mine != read}


def _computed(config: MmdlmConfig) -> dict[str, Any]:
    """Return all of a config that the outputs of a model depend on, by dotted names."""
    fields = json.loads(config.to_json_string(use_diff=False))
    words, vision = fields["vocabulary"], fields["vision"]
    if vision is not None and vision["tower"].get("model_type") in CONFIG_MAPPING:
        # with the defaults of what it leaves out
        vision = vision | {"tower": AutoConfig.for_model(**vision["tower"]).to_dict()}
    start, stop = words["image"]
    return _flat(
        {
            **{name: fields[name] for name in COMPUTED},
            "vision": vision,
            "mask_id": words["mask_id"],
            "eos_id": words["eos_id"],
            "image codes": [start, stop] if stop > start else None,
        }
    )


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested names: {"a": {"b": 1}} becomes {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _copy_the_rest(checkpoint: Checkpoint, out: Path) -> None:
    """Copy tokenizers and whatever else lies beside the weights."""
    for path in checkpoint.folder.rglob("*"):
        check_stays(path, checkpoint.folder)  # what lies elsewhere is not to be given away
    written = {"config.json", WEIGHTS, INDEX, DIGESTS, *(shard.name for shard in checkpoint.shards)}
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name in written or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copy2(path, out / path.name)
