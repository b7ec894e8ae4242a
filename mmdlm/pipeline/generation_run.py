"""Hold one prepared run of the sampler, and find its results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.kernels.linear import PackedLayers
from mmdlm.core.sampling.denoising import Denoising
from mmdlm.core.sampling.generators import Generators
from mmdlm.core.sampling.output import SampleStep
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import Batch, Sequence


class Runner(Protocol):
    """Carries out prepared runs: with others, elsewhere or later."""

    def __call__(self, run: GenerationRun, *, every_step: bool) -> Iterator[SampleStep]:
        """Yield the state of a run after each denoising step, or only after the last.

        Args:
            run: To carry out; the result must be what the run gives by itself.
            every_step: Whether anybody looks at the steps before the last.

        Returns:
            The states, in order.
        """
        ...


@dataclass(frozen=True)
class GenerationRun:
    """One prepared run of the sampler.

    Attributes:
        sampler: Fills the targets.
        denoiser: Predicts them.
        batch: One row for each output.
        unconditional: The other branches of guidance.
        generator: Random numbers of all rows, or one generator for each.
        output_segments: Numbers of the segments of each row that hold its result.
        lengths: Ids of each row's result; what a last block has beyond them is left out.
        grid: (rows, columns) of the result, if it is an image.
        packed: The denoiser's layers, packed from run to run.
        runner: Carries it out; None: it runs here and now, by itself.
    """

    sampler: Sampler
    denoiser: Denoiser
    batch: Batch
    unconditional: tuple[Batch, ...]
    generator: Generators
    output_segments: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    grid: tuple[int, int] | None = None
    packed: PackedLayers | None = None
    runner: Runner | None = None

    @property
    def alone(self) -> bool:
        """Whether each result has to be what it is without the others."""
        return not isinstance(self.generator, torch.Generator)

    def run(self) -> Tensor:
        """Return the ids [B, L] with the targets filled."""
        ids = self.batch.ids
        for state in self._states(every_step=False):
            ids = state.ids
        return ids

    def trajectory(self) -> Iterator[SampleStep]:
        """Yield the state after each denoising step."""
        return self._states(every_step=True)

    def _states(self, *, every_step: bool) -> Iterator[SampleStep]:
        if self.runner is not None:
            return self.runner(self, every_step=every_step)
        return self.sampler.trajectory(
            self.denoiser,
            self.batch,
            generator=self.generator,
            unconditional=self.unconditional,
            packed=self.packed,
        )

    def begin(self) -> Denoising:
        """Return the rows before their first step."""
        return self.sampler.begin(
            self.denoiser,
            self.batch,
            generator=self.generator,
            unconditional=self.unconditional,
            packed=self.packed,
        )

    def results(self, values: Tensor) -> list[Tensor]:
        """Select from ids (or marks) [B, L] those of each row's result: B tensors [R]."""
        return [
            row[torch.isin(segment, torch.tensor(output_segments, device=segment.device))][:length]
            for row, segment, output_segments, length in zip(
                values, self.batch.segment, self.output_segments, self.lengths, strict=True
            )
        ]


def with_generated(sequence: Sequence, ids: Tensor) -> Sequence:
    """Return a document whose targets are now context, as the sampler filled them in a row [L]."""
    lengths = [len(segment.ids) for segment in sequence.segments]
    rows = ids[: sum(lengths)].split(lengths)
    return Sequence(
        tuple(
            replace(segment, ids=row, target=torch.zeros_like(segment.target))
            for segment, row in zip(sequence.segments, rows, strict=True)
        )
    )
