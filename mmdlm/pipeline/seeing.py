"""Name what a denoiser has that looks at images."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from mmdlm.core.sequence import Batch
from mmdlm.vision.encoders.adapter import VisionAdapter


@runtime_checkable
class Seeing(Protocol):
    """A denoiser that looks at images."""

    vision: VisionAdapter | None

    def see(self, batch: Batch) -> Batch:
        """Return the batch with the features of its images in place of their views."""
        ...
