"""Hold one prepared run of the sampler, and find its results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.kernels.linear import PackedLayers
from mmdlm.core.sampling.generators import Generators
from mmdlm.core.sampling.output import SampleStep
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import Batch, Sequence


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
        grid: (rows, columns) of the result, if it is an image.
        packed: The denoiser's layers, packed from run to run.
    """

    sampler: Sampler
    denoiser: Denoiser
    batch: Batch
    unconditional: tuple[Batch, ...]
    generator: Generators
    output_segments: tuple[tuple[int, ...], ...]
    grid: tuple[int, int] | None = None
    packed: PackedLayers | None = None

    @property
    def alone(self) -> bool:
        """Whether each result has to be what it is without the others."""
        return not isinstance(self.generator, torch.Generator)

    def run(self) -> Tensor:
        """Return the ids [B, L] with the targets filled."""
        return self.sampler(
            self.denoiser,
            self.batch,
            generator=self.generator,
            unconditional=self.unconditional,
            packed=self.packed,
        ).ids

    def trajectory(self) -> Iterator[SampleStep]:
        """Yield the state after each denoising step."""
        return self.sampler.trajectory(
            self.denoiser,
            self.batch,
            generator=self.generator,
            unconditional=self.unconditional,
            packed=self.packed,
        )

    def results(self, values: Tensor) -> list[Tensor]:
        """Select from ids (or marks) [B, L] those of each row's result: B tensors [R]."""
        return [
            row[torch.isin(segment, torch.tensor(output_segments, device=segment.device))]
            for row, segment, output_segments in zip(
                values, self.batch.segment, self.output_segments, strict=True
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
