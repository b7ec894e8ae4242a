"""How fast a run is: tokens a second, the share of what the machine can do, memory, waiting."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mmdlm.models.costs import product_rate

STATUS = Path("/proc/self/status")
# What a log says of the machine and not of the model.
MEASURED = (
    *("seconds", "data_share", "peak_memory_gb"),
    *("tokens_per_second", "target_tokens_per_second", "mfu"),
)


@dataclass(frozen=True)
class Load:
    """What a step works on.

    Attributes:
        tokens: That go through the model, padding left out.
        targets: Of these, the tokens that are to be learned, masked in this step or not; once,
            however many copies are masked.
        flops: A scalar, of forward and backward over all tokens of all copies, the head where
            tokens are masked, see `Costs`; None: not known.
    """

    tokens: int
    targets: int
    flops: Tensor | None = None

    def __add__(self, other: Load) -> Load:
        return Load(
            self.tokens + other.tokens,
            self.targets + other.targets,
            None if self.flops is None or other.flops is None else self.flops + other.flops,
        )


@cache
def _rate(device: torch.device, dtype: torch.dtype) -> float:
    with torch.random.fork_rng():
        return product_rate(device, dtype)


class Meter:
    """Adds up the loads of all steps since it was last read; of this process.

    `processes` that work on as much each are counted in tokens, not in `mfu`, which is of one.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, processes: int) -> None:
        self.device, self.processes = device, processes
        self.rate = _rate(device, dtype)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # the run's own begins here
        self._begin()

    def _begin(self) -> None:
        self.load: Load | None = None
        self.waited = self.seconds = 0.0

    def add(self, load: Load | None, *, seconds: float, waited: float) -> None:
        """One step that took so long, of which it waited so long for its data."""
        self.seconds += seconds
        self.waited += waited
        if load is not None:
            self.load = load if self.load is None else self.load + load

    def read(self) -> dict[str, float]:
        """Return what to log, over the steps since the last call.

        Returns:
            `data_share` of the time, spent waiting for data; `tokens_per_second` and
            `target_tokens_per_second` over all processes; `mfu`, the share of the measured rate of
            matrix products that useful work took; `peak_memory_gb` of a GPU since the run began,
            else of the process.
        """
        seconds = max(self.seconds, 1e-9)
        found = {
            "data_share": round(self.waited / seconds, 4),
            "peak_memory_gb": round(self._peak() / 1e9, 3),
        }
        if self.load is not None:
            found["tokens_per_second"] = round(self.processes * self.load.tokens / seconds, 1)
            found["target_tokens_per_second"] = round(
                self.processes * self.load.targets / seconds, 1
            )
            if self.load.flops is not None:
                found["mfu"] = round(float(self.load.flops) / seconds / self.rate, 4)
        self._begin()
        return found

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            lines = STATUS.read_text().splitlines()
        except OSError:  # no Linux
            return 0
        (line,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
