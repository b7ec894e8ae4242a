"""One run of the sampler, made ready, and where its result will lie."""

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
    """One run of the sampler, made ready.

    output_segments   numbers of the segments of each row that hold its result
    grid    (rows, columns) of that, where it is an image
    packed  the denoiser's layers, packed from run to run
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
        """Whether each result is to be what it is without the others."""
        return not isinstance(self.generator, torch.Generator)

    def run(self) -> Tensor:
        """[B, L] ids with the targets filled."""
        return self.sampler(
            self.denoiser,
            self.batch,
            generator=self.generator,
            unconditional=self.unconditional,
            packed=self.packed,
        ).ids

    def trajectory(self) -> Iterator[SampleStep]:
        """Step by step."""
        return self.sampler.trajectory(
            self.denoiser,
            self.batch,
            generator=self.generator,
            unconditional=self.unconditional,
            packed=self.packed,
        )

    def results(self, values: Tensor) -> list[Tensor]:
        """Of [B, L] ids (or marks), those of each row's result: B times [R]."""
        return [
            row[torch.isin(segment, torch.tensor(output_segments, device=segment.device))]
            for row, segment, output_segments in zip(
                values, self.batch.segment, self.output_segments, strict=True
            )
        ]


def with_generated(sequence: Sequence, ids: Tensor) -> Sequence:
    """A document with its targets as the sampler filled them, in a row [L]; it is context now."""
    lengths = [len(segment.ids) for segment in sequence.segments]
    rows = ids[: sum(lengths)].split(lengths)
    return Sequence(
        tuple(
            replace(segment, ids=row, target=torch.zeros_like(segment.target))
            for segment, row in zip(sequence.segments, rows, strict=True)
        )
    )
