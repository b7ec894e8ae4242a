"""What makes a published family: how its config reads, and what it calls its tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.families.weight_map import WeightMap

Json = dict[str, Any]  # the content of a config.json


class Family(ABC):
    """A published family as a reading of the one Transformer.

    Attributes:
        name: What a checkpoint of ours stores about where it came from.
        model_types: What config.json says in `model_type`; several families may say the same.
        image_tokenizer: Where the Hugging Face Hub has it, OWNER/NAME or OWNER/NAME/FOLDER; None:
            the family draws no images.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    weights: ClassVar[WeightMap]
    image_tokenizer: ClassVar[str | None] = None

    @abstractmethod
    def matches(self, config: Json) -> bool:
        """Whether a config.json with one of the family's model types is of this family."""

    @abstractmethod
    def shape(self, config: Json) -> Json:
        """Their config.json -> fields of `MmdlmConfig`, the vocabulary apart.

        Raises ValueError for an option that the one Transformer does not have.
        """

    @abstractmethod
    def vocabulary(self, config: Json, *, tokenizer_size: int | None = None) -> Vocabulary:
        """Return the ids of text, specials and image codes.

        Args:
            config: The published config.json.
            tokenizer_size: Ids of the text tokenizer; MMaDA's image codes begin there.

        Returns:
            Half-open ranges of ids.
        """

    @abstractmethod
    def published_config(self, ours: Mapping[str, Any]) -> Json:
        """Fields of `MmdlmConfig` -> a config.json of the family, for a model that was born here.

        Raises ValueError for what the family cannot say.
        """

    def recognizes(self, names: Collection[str]) -> bool:
        """Whether the tensors' names are those of the family."""
        return bool(names) and all(self.weights(name) is not None for name in names)


def required(config: Json, key: str) -> Any:
    """Return a value of a config.json; ValueError names the key that is missing."""
    if config.get(key) is None:
        raise ValueError(f"config.json has no {key!r}, which a {config.get('model_type')} has")
    return config[key]


def number(config: Json, key: str, *, default: float) -> float:
    """Return a number of a config.json; ValueError where it holds something else."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"config.json has {key} = {value!r}; a number is needed")
    return float(value)


def refuse_unless(config: Json, expected: Mapping[str, Any]) -> None:
    """ValueError where the config asks for what the one Transformer does not do."""
    for key, value in expected.items():
        given = config.get(key, value)
        if given != value:
            raise ValueError(
                f"config.json has {key} = {given!r}; the Transformer does only {key} = {value!r}"
            )


def refuse_to_write(ours: Mapping[str, Any], family: str, expected: Mapping[str, Any]) -> None:
    """ValueError where our config has what the family's config cannot say."""
    for field, value in expected.items():
        given = ours.get(field, value)
        if given != value:
            raise ValueError(
                f"{family} is written with {field} = {value!r}, but this model has {field} = "
                f"{given!r}; keep it in our format, or choose another family"
            )


def special_id(config: Json, key: str, *, default: int, size: int, last: int) -> int:
    """Return a special id: what the config says, else the one its family is published with.

    A vocabulary too small for that (a test model) has it `last` places before its end.
    """
    value = config.get(key)
    if value is None:
        return default if default < size else size - last
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"config.json has {key} = {value!r}; one whole number is needed")
    return value


KERNELS = (None, False, "eager", "sdpa", "flex_attention")


def refuse_kernels(config: Mapping[str, Any]) -> None:
    """Raise ValueError where a config.json asks for kernels, which transformers would download."""
    for key in ("attn_implementation", "experts_implementation", "use_kernels", "kernel_config"):
        for name in (key, f"_{key}", f"_{key}_internal"):
            if config.get(name) not in KERNELS:
                raise ValueError(
                    f"config.json has {name} = {config[name]!r}, and code is never fetched for a "
                    "checkpoint; take the key out, and name what you want where you load it"
                )
