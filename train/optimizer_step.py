"""One optimizer step over several batches: one division, by counts of all processes."""

from __future__ import annotations

import hashlib
import math
import sys
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.stages.meter import Load
from train.stages.stage import Stage
from train.training_config import TrainingConfig


def step_generator(device: torch.device, *seeds: int) -> torch.Generator:
    """Return a generator seeded by (run seed, step, process, micro-batch) and nothing else."""
    digest = hashlib.blake2b(repr(seeds).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def take_step(
    model: nn.Module,
    stage: Stage,
    optimizers: list[torch.optim.Optimizer],
    micro_batches: list[Any],
    accelerator: Accelerator,
    settings: TrainingConfig,
    step: int,
) -> tuple[dict[str, tuple[Tensor, Tensor]], float | None, Load | None]:
    """One optimizer step; gives each term's (sum on this process, count over all) and the norm.

    And what it worked on. Where the norm is not finite nothing is moved; see `_not_finite`. Where
    no term has anything to count on any process, or all gradients are exactly 0 (equal rewards),
    there is nothing to learn: the step is skipped, since momentum and decay would move the weights
    all the same. The norm is then None.
    """
    stage.begin(step)
    batches, noises, counts = [], [], dict.fromkeys(stage.coefficients, torch.zeros(()))
    for index, batch in enumerate(micro_batches):
        batch = batch.to(accelerator.device, non_blocking=True)
        generator = step_generator(
            accelerator.device, settings.seed, step, accelerator.process_index, index
        )
        noise = stage.draw(batch, generator=generator)
        batches.append(batch)
        noises.append(noise)
        for name, count in stage.counts(batch, noise).items():
            counts[name] = counts[name].to(count.device) + count
    counts = accelerator.reduce(counts, reduction="sum")

    zero = torch.zeros((), device=accelerator.device)
    if not any(bool(count) for count in counts.values()):
        return {name: (zero, counts[name]) for name in stage.coefficients}, None, None
    every = []  # sums of each batch
    for index, (batch, noise) in enumerate(zip(batches, noises, strict=True)):
        ends = index == len(batches) - 1
        with nullcontext() if ends else accelerator.no_sync(model):
            sums = model(batch, noise)
            loss = sum(
                weight * sums[name] / counts[name].clamp_min(1)
                for name, weight in stage.coefficients.items()
            )
            # Data-parallel wrappers average over processes, but the counts are global already.
            accelerator.backward(loss * accelerator.num_processes)
        every.append({name: value.detach() for name, value in sums.items()})
    clipped = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
    if not math.isfinite(norm):
        _not_finite(norm, every, step, accelerator, settings)
    for optimizer in optimizers:
        if math.isfinite(norm) and norm > 0:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    loads = [stage.load(*pair) for pair in zip(micro_batches, noises, strict=True)]
    counted = [one for one in loads if one is not None]
    load = sum(counted[1:], counted[0]) if len(counted) == len(loads) else None
    losses = {
        name: (sum((sums[name] for sums in every), zero), counts[name])
        for name in stage.coefficients
    }
    return losses, norm if norm != 0 else None, load


def _not_finite(
    norm: float,
    every: list[dict[str, Tensor]],
    step: int,
    accelerator: Accelerator,
    settings: TrainingConfig,
) -> None:
    """Say which batch made a gradient that is not finite; ValueError where the run is to stop."""
    where = [
        f"loss {name} of batch {number} of {len(every)} is {float(value)}"
        for number, sums in enumerate(every, 1)
        for name, value in sums.items()
        if not math.isfinite(value)
    ]
    said = (
        f"the gradient norm is {norm} at step {step + 1} on process {accelerator.process_index} "
        f"({'; '.join(where) or 'though all losses are finite'})"
    )
    if settings.not_finite == "stop":
        raise ValueError(
            f"{said}; the weights were not moved, and the checkpoints are from before: go on with "
            "a lower learning rate, or leave such steps out with training.not_finite: skip"
        )
    print(f"warning: {said}; the step is left out", file=sys.stderr)


def means_of(
    losses: dict[str, tuple[Tensor, Tensor]], accelerator: Accelerator
) -> dict[str, float]:
    """Return the mean of each loss over all processes, of (sum, count) pairs."""
    sums = accelerator.reduce({name: total for name, (total, _) in losses.items()}, "sum")
    return {name: float(sums[name] / count.clamp_min(1)) for name, (_, count) in losses.items()}
