"""Keep on the device only what computes: the network or the image tokenizer, not both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmdlm.core.sampling.output import SampleStep

if TYPE_CHECKING:
    from mmdlm.pipeline.generation_run import GenerationRun


@dataclass(frozen=True)
class Offload:
    """Moves modules between the CPU and a device, and carries out runs of the sampler between.

    Between two calls of a model everything may stay where the last call left it: at most one module
    is on the device.

    Attributes:
        modules: Of the model; one at a time is on the device.
        device: Where they compute.
    """

    modules: tuple[nn.Module, ...]
    device: torch.device

    def use(self, module: object) -> None:
        """Put a module on the device, and all others on the CPU."""
        for one in self.modules:
            if one is not module:
                self.move(one, torch.device("cpu"))
        for one in self.modules:
            if one is module:
                self.move(one, self.device)

    def move(self, module: nn.Module, device: torch.device) -> None:
        """Move a module, if it is elsewhere."""
        if next(module.parameters()).device != device:
            module.to(device)

    def __call__(self, run: GenerationRun, *, every_step: bool) -> Iterator[SampleStep]:
        """Carry out a run; see `mmdlm.pipeline.generation_run.Runner`.

        Args:
            run: To carry out.
            every_step: Whether anybody looks at the steps before the last.

        Yields:
            The state after each denoising step.
        """
        states = run.sampler.trajectory(
            run.denoiser,
            run.batch,
            generator=run.generator,
            unconditional=run.unconditional,
            packed=run.packed,
        )
        while True:
            self.use(self.modules[0])  # again after each step: images may have been decoded
            state = next(states, None)
            if state is None:
                return
            yield state
