"""All published families, and which of them a checkpoint is of."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mmdlm.models.families.base import Family, Json
from mmdlm.models.families.dimple import Dimple
from mmdlm.models.families.dream import Dream
from mmdlm.models.families.fast_dllm import FastDllm
from mmdlm.models.families.lavida import LavidaDream, LavidaLlada
from mmdlm.models.families.llada import Llada
from mmdlm.models.families.llada_v import LladaV
from mmdlm.models.families.lumina import LuminaDimoo
from mmdlm.models.families.mmada import Mmada
from mmdlm.models.families.sdar import Sdar

# The first one that matches is taken: those with a mark of their own stand first.
FAMILIES: tuple[Family, ...] = (
    LuminaDimoo(),
    Mmada(),
    LavidaLlada(),
    LavidaDream(),
    Llada(),
    LladaV(),
    Dimple(),
    Dream(),
    Sdar(),
    FastDllm(),
)

MODEL_TYPES = tuple(dict.fromkeys(kind for family in FAMILIES for kind in family.model_types))


def family_named(name: str) -> Family:
    """Return the family of a name; ValueError lists the names."""
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"unknown family {name!r}; known are {known}")


def family_of(config: Json, names: Collection[str] = ()) -> Family:
    """Return the family of a config.json and, if known, of the names of its tensors.

    `model_type` does not tell: LLaDA, LLaDA-V and LaViDa share two of them. Raises ValueError
    for a model type that no family has, and for tensors of another family than the config's.
    """
    kind = config.get("model_type")
    candidates = [family for family in FAMILIES if kind in family.model_types]
    if not candidates:
        raise ValueError(
            f"config.json describes a model of type {kind!r}; known are 'mmdlm', "
            f"{', '.join(map(repr, MODEL_TYPES))}; an autoregressive model or an encoder becomes "
            "one with `mmdlm convert --from`"
        )
    fitting = [family for family in candidates if family.matches(config)]
    if not fitting:
        raise ValueError(
            f"config.json of type {kind!r} has the fields of none of the families "
            f"{', '.join(family.name for family in candidates)}; is it complete?"
        )
    family = fitting[0]
    if names and not family.recognizes(names):
        strange = sorted(name for name in names if family.weights(name) is None)
        raise ValueError(
            f"config.json is {family.name}'s, but {len(strange)} of {len(names)} tensors have "
            f"names that {family.name} does not have: {', '.join(strange[:5])}"
        )
    return family


def our_config(config: Json, *, tokenizer_size: int | None = None) -> dict[str, Any]:
    """Turn a published config.json into fields of `MmdlmConfig`, which record the original."""
    family = family_of(config)
    vocabulary = family.vocabulary(config, tokenizer_size=tokenizer_size)
    return {
        **family.shape(config),
        "vocabulary": vocabulary.to_dict(),
        "published": {"family": family.name, "config": config},
    }
