"""Parts of a model that sees: each parameter is in one, and what is frozen is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.vision.encoders.adapter import VisionConfig
from tests.data_pipelines.tiny_vision import TILES, TOWER
from tests.models.tiny import tiny_model
from train.optimizer import AdamW, ExponentialMovingAverage, Muon, Optimizer
from train.stages.param_groups import Parts, parts_of


def seeing(**options: Any) -> MmdlmForMaskedDiffusion:
    return tiny_model(vision=VisionConfig(tower=TOWER, tiling=TILES, **options).to_dict())


def part_of(name: str) -> str:
    if name.startswith("vision.tower."):
        return "vision_tower"
    return "projector" if name.startswith("vision.") else "denoiser"


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_each_parameter_is_in_one_part() -> None:
    model = seeing()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for part, parameters in parts_of(model).items():
        assert {names[id(p)] for p in parameters} == {
            n for n in names.values() if part_of(n) == part
        }
        assert parameters


def test_a_model_without_vision_is_all_denoiser() -> None:
    model = tiny_model()
    assert {part: len(ps) for part, ps in parts_of(model).items()} == {
        "vision_tower": 0,
        "projector": 0,
        "denoiser": len(list(model.parameters())),
    }
    Parts().freeze(model)
    assert Parts().rates(model) == {}


@pytest.mark.parametrize(
    "frozen",
    [
        (),
        ("vision_tower",),
        ("projector",),
        ("vision_tower", "denoiser"),
        ("vision_tower", "projector"),
    ],
)
def test_frozen_parts_have_no_gradient_no_state_and_no_average(frozen: tuple[Any, ...]) -> None:
    model = seeing()
    idle = {id(parameter) for parameter in model.vision.tower.idle_parameters()}
    for parameter in model.parameters():  # as transformers leaves them after loading
        parameter.requires_grad_(True)
    Parts(frozen=frozen).freeze(model)
    expected = {
        name
        for name, parameter in model.named_parameters()
        if part_of(name) not in frozen and id(parameter) not in idle
    }
    assert trainable(model) == expected
    assert len(ExponentialMovingAverage(model, decay=0.9).averages) == len(expected)
    for optimizer in (AdamW(), Muon()):
        groups = [g for one in optimizer.build(model) for g in one.param_groups]
        held = {id(p) for group in groups for p in group["params"]}
        assert held == {id(p) for name, p in model.named_parameters() if name in expected}


@pytest.mark.parametrize("optimizer", [AdamW(0.5), Muon(0.5, rest=AdamW(0.25))], ids=str)
def test_each_part_has_its_rate(optimizer: Optimizer) -> None:
    model = seeing()
    parts = Parts(vision_tower_lr=2e-6, projector_lr=1e-3)
    parts.freeze(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for one in optimizer.build(model, rates=parts.rates(model)):
        for group in one.param_groups:
            for parameter in group["params"]:
                part = part_of(names[id(parameter)])
                expected = {"vision_tower": (2e-6,), "projector": (1e-3,), "denoiser": (0.5, 0.25)}
                assert group["peak"] in expected[part]
                if part != "denoiser":
                    assert isinstance(one, torch.optim.AdamW)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"vision_tower_lr": 0.0},
            "vision_tower_lr is 0.0; it must be above 0, or freeze vision_tower",
        ),
        ({"projector_lr": -1.0}, "projector_lr is -1.0"),
        (
            {"vision_tower_lr": 1e-5, "frozen": ("vision_tower",)},
            "vision_tower_lr is 1e-05 but vision_tower is frozen",
        ),
    ],
)
def test_options_that_contradict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Parts(**options)


@pytest.mark.parametrize(
    "parts, model, message",
    [
        (
            Parts(frozen=("vision_tower",)),
            tiny_model,
            "vision_tower is named, but this model has none",
        ),
        (Parts(projector_lr=1e-3), tiny_model, "projector is named, but this model has none"),
        (
            Parts(frozen=("vision_tower", "projector", "denoiser")),
            seeing,
            "frozen, and nothing else",
        ),
    ],
)
def test_models_that_lack_the_part(parts: Parts, model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts.freeze(model())
