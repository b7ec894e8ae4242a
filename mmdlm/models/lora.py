"""LoRA adapters of PEFT, trained on our names or on those of a published family."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmdlm.models.families.auto import FAMILIES
from mmdlm.vision.checkpoint_files import check_stays, read_json, reason_of, shown
from mmdlm.vision.digests import check_digests, forget_digests, write_digests

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASKS = "trained_tasks.json"  # what the model is trained for, with the adapter
TEMPLATE = "chat_template.jinja"  # as transformers saves it with a tokenizer
PREFIX = "base_model.model."
PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.default)?(?P<ending>\.weight|\.bias)?"
)
# How an adapter was begun, and on which layers: settled once it is trained.
SETTLED: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "target_parameters": None,
    "task_type": None,
}
# What an adapter computes, and what says nothing about that. Others change it, or import modules.
COMPUTED = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "fan_in_fan_out", "bias"),
    *("lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "target_modules"),
)
IGNORED = (
    *("peft_type", "peft_version", "revision", "megatron_core", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying"),
)


@dataclass(frozen=True)
class Lora:
    """A LoRA as it was trained.

    Attributes:
        config: Content of adapter_config.json.
        parts: Of low rank: (module, part of it) -> tensor, by the adapter's own names.
        whole: What was trained in full (`modules_to_save`, biases), by the adapter's own names.
        base: Weights below the low rank that PEFT wrote too, as it does for heads and embeddings.
    """

    folder: Path
    config: dict[str, Any]
    parts: dict[tuple[str, str], Tensor]
    whole: dict[str, Tensor]
    base: dict[str, Tensor]

    @classmethod
    def open(cls, folder: Path) -> Lora:
        """Read a folder; ValueError for a file that is missing or damaged, or another method."""
        config = read_json(folder / CONFIG)
        kind = config.get("peft_type") if isinstance(config, dict) else None
        if kind != "LORA":
            raise ValueError(f"{folder / CONFIG} describes an adapter of type {kind!r}, not 'LORA'")
        _check_numbers(config, folder / CONFIG)
        for name, value in config.items():
            if name not in (*COMPUTED, *SETTLED, *IGNORED) and value not in (None, False, [], {}):
                raise ValueError(
                    f"{folder / CONFIG} has {name} = {shown(value)}, which is not known here; "
                    f"known are {', '.join(COMPUTED)}"
                )
        if not (folder / WEIGHTS).is_file():
            raise ValueError(
                f"{folder / WEIGHTS} is missing; copy or download the folder again (weights in "
                ".bin files are not read: save them as safetensors)"
            )
        check_stays(folder / WEIGHTS, folder)
        check_digests(folder)
        try:
            tensors = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{folder / WEIGHTS} is damaged ({reason_of(error)}); download it"
            ) from error
        parts, whole, base = {}, {}, {}
        for name, tensor in tensors.items():
            name = name.removeprefix(PREFIX)
            if match := PART.fullmatch(name):
                parts[match["module"], match["part"] + (match["ending"] or "")] = tensor
            elif ".base_layer." in name:
                base[name.replace(".base_layer.", ".")] = tensor
            else:
                whole[name.replace(".modules_to_save.", ".")] = tensor
        if not parts:
            raise ValueError(f"{folder / WEIGHTS} holds no tensor of a LoRA; is it another method?")
        return cls(folder, config, parts, whole, base)

    def chat_template(self) -> str | None:
        """Return the chat template that the adapter was trained with, where it carries one.

        Returns:
            Its Jinja text, or None.

        Raises:
            ValueError: The file is no text, or a link that leads elsewhere.
        """
        path = self.folder / TEMPLATE
        if not path.exists():
            return None
        check_stays(path, self.folder)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({reason_of(error)}); mend it or remove it"
            ) from error

    def trained_tasks(self) -> list[str] | None:
        """Return what the model is trained for with the adapter, where it says so.

        Returns:
            Names of tasks, or None.

        Raises:
            ValueError: The file holds no names of tasks, or is a link that leads elsewhere.
        """
        path = self.folder / TASKS
        if not path.exists():
            return None
        check_stays(path, self.folder)
        tasks = read_json(path)
        if not isinstance(tasks, list) or not all(isinstance(one, str) for one in tasks):
            raise ValueError(f"{path} holds {shown(tasks)}; a list of names is needed")
        return tasks

    @property
    def modules(self) -> list[str]:
        """Modules with a part of low rank."""
        return sorted({module for module, _ in self.parts})

    def onto(self, model: PreTrainedModel, *, merge: bool) -> None:
        """Add the adapter to a model in place: beside its weights, or into them.

        Raises ValueError for modules that the model does not have, or has in another shape, and
        where PEFT is not installed.
        """
        try:
            from peft import LoraConfig, LoraModel, set_peft_model_state_dict
        except ImportError as error:
            raise ValueError("an adapter needs PEFT; install with: pip install peft") from error
        names = self._names(model)
        self._check_shapes(model, names)
        known = {field.name for field in fields(LoraConfig)}
        whole = sorted({names[name].rpartition(".")[0] for name in self.whole})
        saved = [name for name in whole if self.config.get("modules_to_save")]
        try:
            config = LoraConfig(
                **{key: self.config[key] for key in COMPUTED if key in known & self.config.keys()}
                | {key: value for key, value in SETTLED.items() if key in known}
                | self._patterns(names)
                | {"modules_to_save": saved or None},
            )
            tuner = LoraModel(model, {"default": config}, "default")
        except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ValueError(
                f"{self.folder / CONFIG} does not describe a LoRA ({reason_of(error)}); copy or "
                "download it again"
            ) from error
        state = {f"{names[module]}.{part}": tensor for (module, part), tensor in self.parts.items()}
        state |= {names[name]: tensor for name, tensor in self.whole.items()}
        for name, tensor in self.base.items():
            module, _, leaf = names[name].rpartition(".")
            state[f"{module}.base_layer.{leaf}"] = tensor
        result = set_peft_model_state_dict(model, state)
        assert not result.unexpected_keys, result.unexpected_keys
        if merge:
            tuner.merge_and_unload()
        else:
            model._hf_peft_config_loaded = True  # `save_pretrained` writes only the adapter

    def _names(self, model: PreTrainedModel) -> dict[str, str]:
        """Map the adapter's names of modules and whole tensors to ours."""
        modules, tensors = {name for name, _ in model.named_modules()}, set(model.state_dict())
        ours = dict.fromkeys(self.modules, modules)
        ours |= dict.fromkeys((*self.whole, *self.base), tensors)
        wanted = list(ours)
        best: dict[str, str] = {}
        for rename in _renamings():
            pairs = ((name, rename(name)) for name in wanted)
            names = {name: new for name, new in pairs if new is not None and new in ours[name]}
            if len(names) == len(wanted):
                return names
            best = max(best, names, key=len)
        strange = [name for name in wanted if name not in best]
        raise ValueError(
            f"adapter {self.folder}: {len(strange)} of its {len(wanted)} modules are not in the "
            f"model: {', '.join(strange[:3])}; it was trained on another one"
        )

    def _check_shapes(self, model: PreTrainedModel, names: dict[str, str]) -> None:
        misshapen = []
        for (module, part), tensor in self.parts.items():
            if not tensor.dtype.is_floating_point:
                misshapen.append(f"{part} of {module} holds {tensor.dtype}, not fractions")
            needed = _shape(model.get_submodule(names[module]), part, self._rank(module))
            if needed is not None and tuple(tensor.shape) != needed:
                misshapen.append(
                    f"{part} of {module} is {list(tensor.shape)} where {list(needed)} is needed"
                )
        tensors = model.state_dict()
        for name, tensor in (self.whole | self.base).items():
            needed = tuple(tensors[names[name]].shape)
            if tuple(tensor.shape) != needed:
                misshapen.append(f"{name} is {list(tensor.shape)} where {list(needed)} is needed")
        if misshapen:
            count = len(self.parts) + len(self.whole) + len(self.base)
            raise ValueError(
                f"adapter {self.folder} does not fit the model: {len(misshapen)} of its {count} "
                f"tensors are misshapen: {', '.join(misshapen[:2])}"
            )

    def _rank(self, module: str) -> int:
        return int(_by_pattern(self.config, "rank_pattern", module, self.config.get("r", 8)))

    def _patterns(self, names: dict[str, str]) -> dict[str, Any]:
        """Return the modules, their ranks and their scales, under our names."""
        alpha = self.config.get("lora_alpha", 8)
        scales = {
            names[module]: _by_pattern(self.config, "alpha_pattern", module, alpha)
            for module in self.modules
        }
        ranks = {names[module]: self._rank(module) for module in self.modules}
        return {
            "target_modules": sorted(ranks),
            "rank_pattern": {k: v for k, v in ranks.items() if v != self.config.get("r", 8)},
            "alpha_pattern": {k: v for k, v in scales.items() if v != alpha},
        }


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether a model has an adapter beside its weights."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def save_adapter(
    model: PreTrainedModel, folder: Path, *, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write the adapter of a model as PEFT does.

    By PEFT itself: transformers asks for a PEFT that may be newer than any that is released.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name="default")
    stored = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    forget_digests(folder)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    write_digests(folder)
    model.peft_config["default"].save_pretrained(folder)


def _renamings() -> Iterable[Callable[[str], str | None]]:
    """Ways from an adapter's names to ours; the first is that they are ours."""
    yield lambda name: name
    for family in FAMILIES:
        yield lambda name, weights=family.weights: _renamed(name, weights)  # type: ignore[misc]


def _renamed(name: str, weights: Callable[[str], str | None]) -> str | None:
    """Map the name of a tensor or a module to ours; a map knows only tensors."""
    ours = weights(name)
    if ours is None:
        ours = weights(f"{name}.weight")
        ours = None if ours is None else ours.removesuffix(".weight")
    return ours


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    """Raise ValueError for a rank or a scale that is no number, or a pattern that is none."""
    numbers = {name: config.get(name, 8) for name in ("r", "lora_alpha")}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"{path} has {name} = {shown(pattern)}; an object {{...}} is needed")
        for key, value in pattern.items():
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{path} has {name} with {shown(key)} ({error})") from error
            numbers[f"{name}.{key}"] = value
    for name, value in numbers.items():
        whole = name == "r" or name.startswith("rank_pattern")
        kind = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 2**31:
            raise ValueError(
                f"{path} has {shown(name)} = {shown(value)}; a {'whole ' * whole}number above 0 is "
                "needed"
            )


def _by_pattern(config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """PEFT's rule: the value of the first pattern that the end of a module's name matches."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _shape(module: nn.Module, part: str, rank: int) -> tuple[int, ...] | None:
    """Return the shape that a low-rank part must have; None where PEFT knows better."""
    if isinstance(module, nn.Embedding):
        return {
            "lora_embedding_A": (rank, module.num_embeddings),
            "lora_embedding_B": (module.embedding_dim, rank),
        }.get(part)
    if isinstance(module, nn.Linear):
        return {
            "lora_A.weight": (rank, module.in_features),
            "lora_B.weight": (module.out_features, rank),
            "lora_magnitude_vector": (module.out_features,),
        }.get(part)
    return None
