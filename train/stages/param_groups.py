"""The parts of a model that sees: which of them are trained, and how fast each learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from mmdlm.models.auto import PretrainedDenoiser

Part = Literal["vision_tower", "projector", "denoiser"]


@dataclass(frozen=True)
class Parts:
    """What learns: the vision tower, the projector from it to the denoiser, and the rest.

    A new projector is best trained alone before all is (LLaDA-V: frozen [vision_tower, denoiser] at
    1e-3, then all at 1e-5 with vision_tower_lr 2e-6; arXiv:2505.16933, section 3.3).

    Attributes:
        vision_tower_lr: Peak learning rate of the part; None: the optimizer's own.
        projector_lr: Peak learning rate of the part; None: the optimizer's own.
        frozen: Parts that stay as they are: no gradient, no optimizer state, no average.
    """

    vision_tower_lr: float | None = None
    projector_lr: float | None = None
    frozen: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        for part, rate in self._rates.items():
            if not rate > 0:
                raise ValueError(f"{part}_lr is {rate}; it must be above 0, or freeze {part}")
            if part in self.frozen:
                raise ValueError(f"{part}_lr is {rate} but {part} is frozen; leave one of them out")

    @property
    def _rates(self) -> dict[Part, float]:
        given: dict[Part, float | None] = {
            "vision_tower": self.vision_tower_lr,
            "projector": self.projector_lr,
        }
        return {part: rate for part, rate in given.items() if rate is not None}

    def freeze(self, denoiser: PretrainedDenoiser) -> None:
        """Let the parameters of the frozen parts ask for no gradient.

        Raises ValueError where a part is named that the model lacks, or nothing is left to train.
        """
        parts = parts_of(denoiser)
        for part in (*self.frozen, *self._rates):
            if not parts[part]:
                raise ValueError(
                    f"model.parts: {part} is named, but this model has none; give it "
                    f"`model.vision`, or leave {part} out"
                )
        vision = getattr(denoiser, "vision", None)
        if vision is not None:
            vision.freeze_idle()
        for part in self.frozen:
            for parameter in parts[part]:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in denoiser.parameters()):
            raise ValueError(
                f"model.parts: {', '.join(self.frozen)} are frozen, and nothing else is"
            )

    def rates(self, denoiser: PretrainedDenoiser) -> dict[nn.Parameter, float]:
        """Peak learning rates of the parameters that do not learn at the optimizer's own."""
        parts = parts_of(denoiser)
        return {parameter: rate for part, rate in self._rates.items() for parameter in parts[part]}


def parts_of(denoiser: PretrainedDenoiser) -> dict[Part, list[nn.Parameter]]:
    """Each parameter of a model in the one part that it belongs to."""
    vision = getattr(denoiser, "vision", None)
    tower = list(vision.tower.parameters()) if vision is not None else []
    seeing = list(vision.parameters()) if vision is not None else []
    inside = {id(parameter) for parameter in tower}
    adapter = {id(parameter) for parameter in seeing}
    return {
        "vision_tower": tower,
        "projector": [parameter for parameter in seeing if id(parameter) not in inside],
        "denoiser": [p for p in denoiser.parameters() if id(p) not in adapter],
    }
