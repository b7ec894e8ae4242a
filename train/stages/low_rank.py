"""LoRA: matrices of low rank beside frozen weights, by PEFT, saved alone and added to them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipelines.room import check_room
from mmdlm.models.auto import PretrainedDenoiser
from mmdlm.models.lora import CONFIG, PREFIX, WEIGHTS
from mmdlm.vision.digests import write_digests

NAME = "default"  # PEFT's, of the one adapter
DOWN, UP = f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"


@dataclass(frozen=True)
class LowRank:
    """W + alpha / rank * B A, of which A and B are trained.

    Attributes:
        rank: Columns of B, rows of A.
        alpha: Scale of the product, times the rank.
        dropout: Share of inputs of A that are dropped.
        targets: Linear layers of the denoiser by the last part of their names: q_proj, k_proj,
            v_proj, o_proj, gate_proj, up_proj, down_proj; those of a vision tower stay as they are.

    Source: arXiv:2106.09685.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora: rank is {self.rank}; it must be at least 1")
        if not self.alpha > 0:
            raise ValueError(f"lora: alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout is {self.dropout}; a share lies in [0, 1)")
        if not self.targets:
            raise ValueError("lora: targets is empty; name layers, such as q_proj and v_proj")

    @property
    def scale(self) -> float:
        """Return the factor of B A."""
        return self.alpha / self.rank

    def onto(self, denoiser: PretrainedDenoiser, *, seed: int) -> Adapted:
        """Freeze the denoiser but for its vision adapter, and put the matrices beside its layers.

        They are float32, whatever the weights are, and B is zero: nothing is changed at first.
        Raises ValueError for a target that the model lacks, and where PEFT is not installed.
        """
        try:
            from peft import LoraConfig, LoraModel
        except ImportError as error:
            raise ValueError("lora needs PEFT; install with: pip install peft") from error
        modules = list(self._modules(denoiser))
        numbers = sum(self.rank * sum(_sides(denoiser.get_submodule(module))) for module in modules)
        check_room(
            f"lora of rank {self.rank} on {len(modules)} layers",
            {"matrices": 4 * numbers, "gradients": 4 * numbers},
            mend="lora.rank",
        )
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=modules,
        )
        vision = getattr(denoiser, "vision", None)
        learns = [p for p in (vision.parameters() if vision else ()) if p.requires_grad]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                tuner = LoraModel(denoiser, {NAME: config}, NAME)
            except TypeError as error:  # PEFT's, for weights in a format that it has no layer for
                raise ValueError(f"lora: the model's weights take no matrices ({error})") from error
        for parameter in learns:
            parameter.requires_grad_(True)
        return Adapted(self, tuner)

    def _modules(self, denoiser: PretrainedDenoiser) -> Iterator[str]:
        """Full names of the layers."""
        linear = [
            name
            for name, module in denoiser.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith("vision.")
        ]
        for target in self.targets:
            found = [name for name in linear if name.rpartition(".")[2] == target]
            if not found:
                known = sorted({name.rpartition(".")[2] for name in linear})
                raise ValueError(
                    f"lora: the model has no {target!r} among its layers ({', '.join(known)})"
                )
            yield from found


def _sides(layer: nn.Module) -> tuple[int, int]:
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


@dataclass(frozen=True)
class Adapted:
    """A denoiser with the matrices in it."""

    low_rank: LowRank
    tuner: Any

    @property
    def is_all_that_learns(self) -> bool:
        """Whether nothing is trained beside the matrices, such as a vision adapter."""
        learning = (n for n, p in self.tuner.model.named_parameters() if p.requires_grad)
        return all(name.endswith((DOWN, UP)) for name in learning)

    def remove(self) -> None:
        """Take the matrices out again; the denoiser is as it was."""
        self.tuner.unload()

    def merged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the denoiser with the matrices in it -> those of the denoiser without.

        Where there are matrices their product is added, in float32.
        """
        scale = self.low_rank.scale
        merged = {}
        for name, tensor in weights.items():
            if name.endswith((DOWN, UP)):
                continue
            module, _, leaf = name.rpartition(".base_layer.")
            if module and leaf == "weight":
                down, up = weights[module + DOWN].float(), weights[module + UP].float()
                tensor = tensor.float() + scale * (up @ down)
            merged[f"{module}.{leaf}" if module else name] = tensor
        return merged

    def save(self, weights: Mapping[str, Tensor], folder: Path, *, base: str) -> None:
        """Write only the matrices, as PEFT does, under our names of the layers.

        Args:
            weights: The matrices, by our names.
            folder: To write into.
            base: Folder or repository of the model that they belong to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        low_rank = self.low_rank
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "r": low_rank.rank,
            "lora_alpha": low_rank.alpha,
            "lora_dropout": low_rank.dropout,
            "target_modules": list(low_rank.targets),
            "exclude_modules": r"vision\..*",
            "bias": "none",
            "inference_mode": True,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        matrices = {
            PREFIX + name.replace(f".{NAME}.", "."): tensor.contiguous()
            for name, tensor in weights.items()
            if name.endswith((DOWN, UP))
        }
        save_file(matrices, folder / WEIGHTS, metadata={"format": "pt"})
        write_digests(folder)
