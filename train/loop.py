"""The one training loop, over accelerate. A killed run goes on as if it had not been."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from train import checkpoint
from train.optimizer import AdamW, Cosine, ExponentialMovingAverage, LearningRate, Optimizer

LOG = "log.jsonl"


class Stage(nn.Module, ABC):
    """What one stage of training computes on one batch; `fit` knows nothing else about it.

    The noise is drawn before the forward pass, so that the denominators of all processes and all
    accumulation steps are known when the first gradient is taken.
    """

    coefficients: Mapping[str, float]  # weight of each loss term

    @abstractmethod
    def draw(self, batch: Any, *, generator: torch.Generator) -> Any:
        """All randomness of the step; no gradient."""

    @abstractmethod
    def counts(self, batch: Any, noise: Any) -> dict[str, Tensor]:
        """Denominator of each loss term, scalars."""

    @abstractmethod
    def forward(self, batch: Any, noise: Any) -> dict[str, Tensor]:
        """Sum of each loss term, scalars with gradient."""

    def compile_layers(self) -> None:
        """Hand the repeated layers to torch.compile, where the stage has any."""


class Loader(Protocol):
    """An endless iterable of batches that can say where it is, and go there."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the batch that was yielded last."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next batch is the one that followed that position."""


@dataclass(frozen=True)
class FitSettings:
    """How long, how fast, and what to keep.

    steps             optimizer steps of the whole run
    accumulation      batches a step, per process
    clip              largest gradient norm
    ema               decay of the averaged weights
    mixed_precision   "no", "bf16", or "auto": bf16 on an accelerator, float32 on a CPU
    compile           torch.compile the layers
    checkpoint_every  steps between checkpoints (the newest `keep` stay); the last step has one
    sample_every      steps between sample sheets; 0 for none
    log_every         steps between lines of the log
    trackers          of accelerate: tensorboard, wandb, trackio
    """

    steps: int = 1000
    accumulation: int = 1
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: LearningRate = field(default_factory=Cosine)
    clip: float = 1.0
    ema: float = 0.999
    mixed_precision: str = "auto"
    compile: bool = False
    checkpoint_every: int = 500
    keep: int = 2
    sample_every: int = 0
    log_every: int = 10
    trackers: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "checkpoint_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def fit(
    stage: Stage,
    loader: Loader,
    *,
    settings: FitSettings,
    out: Path,
    on_sample: Callable[[int], None] | None = None,
) -> None:
    """Train until `settings.steps`, from the newest checkpoint in `out` where there is one.

    On return the stage holds the averaged weights. `on_sample(step)` is called on the main process
    with the averaged weights in place. Interrupt (Ctrl-C) or SIGTERM: the step is finished, a
    checkpoint written, and SystemExit raised. `out/log.jsonl` holds a line per logged step.
    """
    accelerator = Accelerator(
        mixed_precision=_precision(settings.mixed_precision),
        log_with=list(settings.trackers) or None,
        project_dir=str(out),
    )
    if settings.compile:
        stage.compile_layers()
    model, *optimizers = accelerator.prepare(stage, *settings.optimizer.build(stage))
    ema = ExponentialMovingAverage(stage, decay=settings.ema)
    accelerator.register_for_checkpointing(ema)

    found = checkpoint.latest(out)
    first = 0
    if found:
        path, first = found
        accelerator.load_state(str(path))
        loader.load_state_dict(torch.load(path / _loader_file(accelerator), weights_only=False))
        accelerator.print(f"continuing from {path} at step {first} of {settings.steps}")
    log = _Log(out / LOG, first, enabled=accelerator.is_main_process)
    if settings.trackers:
        accelerator.init_trackers(out.name)

    def write(folder: Path) -> None:
        accelerator.save_state(str(folder))
        torch.save(loader.state_dict(), folder / _loader_file(accelerator))

    batches = iter(loader)
    bar = tqdm(
        total=settings.steps, initial=first, unit="step", disable=not accelerator.is_main_process,
        dynamic_ncols=True, mininterval=1.0,
    )  # fmt: skip
    saved = first
    with _stop_signals() as stop, bar:
        for step in range(first, settings.steps):
            started = time.perf_counter()
            micro = [next(batches) for _ in range(settings.accumulation)]
            waited = time.perf_counter() - started
            rate = settings.schedule.factor(step, settings.steps)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak"] * rate
            losses, norm = _step(model, stage, optimizers, micro, accelerator, settings, step)
            ema.update()
            bar.update()

            done = step + 1
            last = done == settings.steps
            if done % settings.log_every == 0 or last:
                means = _means(losses, accelerator)
                entry = {
                    **{f"loss/{name}": value for name, value in means.items()},
                    "grad_norm": float(norm),
                    "learning_rate": optimizers[0].param_groups[0]["lr"],
                    "seconds": round(time.perf_counter() - started, 4),
                    "data_share": round(waited / (time.perf_counter() - started), 4),
                }
                log.write(done, entry)
                accelerator.log(entry, step=done)
                bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
            if settings.sample_every and on_sample and (done % settings.sample_every == 0 or last):
                if accelerator.is_main_process:
                    with ema.applied():
                        on_sample(done)
                accelerator.wait_for_everyone()
            if done % settings.checkpoint_every == 0 or last or stop.asked:
                saved = done
                checkpoint.save(out, done, write, keep=settings.keep)
            if stop.asked and not last:
                accelerator.end_training()
                raise SystemExit(f"stopped at step {saved}; the same command continues from there")
    accelerator.end_training()
    ema.copy_to_parameters()


def step_generator(device: torch.device, *seeds: int) -> torch.Generator:
    """A generator that depends on nothing but its seeds: (run seed, step, process, micro-batch)."""
    digest = hashlib.blake2b(repr(seeds).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def _step(
    model: nn.Module,
    stage: Stage,
    optimizers: list[torch.optim.Optimizer],
    micro: list[Any],
    accelerator: Accelerator,
    settings: FitSettings,
    step: int,
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """One optimizer step; gives each term's (sum on this process, count over all) and the norm."""
    batches, noises, counts = [], [], dict.fromkeys(stage.coefficients, torch.zeros(()))
    for index, batch in enumerate(micro):
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

    totals = dict.fromkeys(stage.coefficients, torch.zeros((), device=accelerator.device))
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
        for name, value in sums.items():
            totals[name] = totals[name] + value.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), settings.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: (totals[name], counts[name]) for name in stage.coefficients}, norm


def _means(losses: dict[str, tuple[Tensor, Tensor]], accelerator: Accelerator) -> dict[str, float]:
    sums = accelerator.reduce({name: total for name, (total, _) in losses.items()}, "sum")
    return {name: float(sums[name] / count.clamp_min(1)) for name, (_, count) in losses.items()}


def _precision(name: str) -> str:
    if name == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return name


def _loader_file(accelerator: Accelerator) -> str:
    return f"loader_{accelerator.process_index}.pt"


class _Log:
    """One JSON line a logged step; lines beyond the step a run continues from are dropped."""

    def __init__(self, path: Path, first: int, *, enabled: bool) -> None:
        self.path, self.enabled = path, enabled
        if not enabled:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _logged_step(line) in range(1, first + 1)]
        path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, step: int, entry: dict[str, float]) -> None:
        if self.enabled:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **entry}) + "\n")


def _logged_step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # the last line of a killed run may be torn
        return -1


class _Stop:
    asked = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM ask for a stop at the end of the step; a second Ctrl-C stops at once."""
    stop = _Stop()

    def ask(number: int, frame: object) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = True

    try:
        previous = {
            number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not the main thread: the caller handles signals
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
