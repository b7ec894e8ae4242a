"""The one training loop, over accelerate. A killed run goes on as if it had not been."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from data_pipelines.room import check_room
from mmdlm.models.checkpoints.run_steps import SETUP
from mmdlm.models.quantization import is_quantized
from train.checkpoints.checkpoint import Checkpoints, latest, replace_folder
from train.checkpoints.manifest import check_newest
from train.checkpoints.record import Record
from train.checkpoints.rehearsal import rehearse
from train.checkpoints.run_state import RunState
from train.optimizer import (
    NO_RATES,
    AdamW,
    Cosine,
    ExponentialMovingAverage,
    LearningRate,
    Optimizer,
    Rates,
)
from train.stages.meter import Load, Meter

LOG = "log.jsonl"
NOT_FINITE = 10  # steps on end without a finite gradient, after which a run stops all the same
# That end a run after its step; SIGHUP, where there is one, is that of a terminal that closes.
SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Stage(nn.Module, ABC):
    """What one stage of training computes on one batch; `fit` knows nothing else about it.

    The noise is drawn before the forward pass, so that the denominators of all processes and all
    accumulation steps are known when the first gradient is taken.
    """

    coefficients: Mapping[str, float]  # weight of each loss term

    def begin(self, step: int) -> None:
        """Told the 0-based step that comes next, before its noise is drawn."""
        return

    @abstractmethod
    def draw(self, batch: Any, *, generator: torch.Generator) -> Any:
        """All randomness of the step; no gradient."""

    @abstractmethod
    def counts(self, batch: Any, noise: Any) -> dict[str, Tensor]:
        """Denominator of each loss term, scalars."""

    @abstractmethod
    def forward(self, batch: Any, noise: Any) -> dict[str, Tensor]:
        """Sum of each loss term, scalars with gradient."""

    def load(self, batch: Any, noise: Any) -> Load | None:
        """What a step on this batch works on, for the log; None: nobody counts."""
        return None

    def rates(self) -> Rates:
        """Peak learning rates of the parameters that do not learn at the optimizer's own."""
        return NO_RATES

    def statistics(self) -> dict[str, float]:
        """What else to log of the step just done; asked on every process, written on the main."""
        return {}

    @property
    def is_spent(self) -> bool:
        """Whether the run is to end here, before its last step: a budget of its own is used up."""
        return False

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
class TrainingConfig:
    """How long, how fast, and what to keep.

    max_steps optimizer steps of the whole run
    gradient_accumulation_steps      batches a step, per process
    max_grad_norm              largest gradient norm
    ema               decay of the averaged weights; 0 keeps and saves none
    mixed_precision   "no", "bf16", or "auto": bf16 on an accelerator, float32 on a CPU
    compile           torch.compile the layers; "auto": on a GPU
    save_steps  steps between checkpoints (the newest `save_total_limit` stay); the last step has
                one
    sample_steps      steps between sample sheets; 0 for none
    logging_steps         steps between lines of the log
    not_finite        what becomes of a step whose gradient is NaN or infinite: "stop" the run, or
                      "skip" it, up to ten on end; the weights are moved by neither
    trackers          of accelerate: tensorboard, wandb, trackio
    """

    max_steps: int = 1000
    gradient_accumulation_steps: int = 1
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: LearningRate = field(default_factory=Cosine)
    max_grad_norm: float = 1.0
    ema: float = 0.999
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    compile: Literal["auto"] | bool = "auto"
    save_steps: int = 500
    save_total_limit: int = 2
    sample_steps: int = 0
    logging_steps: int = 10
    not_finite: Literal["stop", "skip"] = "stop"
    trackers: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "gradient_accumulation_steps",
            "save_steps",
            "save_total_limit",
            "logging_steps",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value}; it must be a number, at least 1")
        for name, kind in (("optimizer", Optimizer), ("schedule", LearningRate)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} is {getattr(self, name)}; name one, or leave it out")
        for name in ("max_grad_norm", "ema"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number")
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm is {self.max_grad_norm}; it must be above 0, and .inf clips nothing"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; a decay lies in [0, 1), and 0 keeps no average")


def fit(
    stage: Stage,
    loader: Loader,
    *,
    settings: TrainingConfig,
    out: Path,
    on_sample: Callable[[int], None] | None = None,
    told: Mapping[str, Any] = MappingProxyType({}),
    setup: Callable[[Path], None] | None = None,
) -> dict[str, Tensor]:
    """Train until `settings.max_steps`, from the newest checkpoint in `out` where there is one.

    A stage whose budget is spent ends the run before that, as its last step would. `told` are the
    settings of the whole recipe, which a run goes on with; see `Record`. `setup` fills `out/setup`
    on the main process, before the first step: all that the weights of any step are asked with.

    On return the stage holds the averaged weights; the result is its state dict on the CPU, whole
    on the main process even where the weights are sharded, and without what stays as it is where
    that is quantized. `on_sample(step)` is called on the main
    process with the averaged weights in place. Interrupt (Ctrl-C), SIGTERM or SIGHUP: the step is
    finished, a checkpoint written, and `Stopped` raised, with the status that a shell gives to the
    signal. `out/log.jsonl` holds a line per logged step; its `skipped_steps` counts those that left
    the weights alone, as there was nothing to learn or the gradient was not finite.

    What a new run needs later is tried before its first step, on_sample(0) among it; see
    `train.checkpoints.rehearsal`.

    Raises ValueError for a checkpoint that is damaged or does not fit, for what is tried and fails,
    and for a gradient that is not finite, before it moves the weights; OSError when a checkpoint
    cannot be written, which leaves the one before in place.
    """
    accelerator = Accelerator(
        mixed_precision=precision(settings.mixed_precision),
        log_with=list(settings.trackers) or None,
        project_dir=str(out),
    )
    _check_trackers(settings.trackers, accelerator)
    on_gpu = accelerator.device.type == "cuda"
    if settings.compile is True or (settings.compile == "auto" and on_gpu):
        stage.compile_layers()
    _check_fits(stage, settings, accelerator.device)
    optimizers = settings.optimizer.build(stage, rates=stage.rates())
    _check_sharding(optimizers, settings, accelerator)
    model, *optimizers = accelerator.prepare(stage, *optimizers)
    model.train()
    meter = Meter(
        accelerator.device,
        torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32,
        processes=accelerator.num_processes,
    )
    ema = ExponentialMovingAverage(stage, decay=settings.ema)
    weights = {name: float(weight) for name, weight in stage.coefficients.items()}
    record = Record.of({"training": settings, "loss_weights": weights, **told})
    state = RunState(accelerator, optimizers, loader, ema, stage, record=record)
    checkpoints = Checkpoints(
        out,
        keep=settings.save_total_limit,
        is_main=accelerator.is_main_process,
        wait=accelerator.wait_for_everyone,
    )

    first = 0
    on_main(partial(check_newest, out), accelerator=accelerator)
    if found := latest(out):
        path, first = found
        if first > settings.max_steps:
            raise ValueError(
                f"{path} is beyond the {settings.max_steps} steps of this run; give "
                f"training.max_steps at least {first}, or train into another folder"
            )
        state.read(path, step=first)
        written = any((out / name).is_dir() for name in ("final", "adapter"))
        done_before = (first == settings.max_steps or stage.is_spent) and written
        for said in record.check(path, finished=done_before):
            accelerator.print(f"going on with another setting than {path}: {said}")
        accelerator.print(f"continuing from {path} at step {first} of {settings.max_steps}")
    else:
        sheet = None
        if on_sample is not None and settings.sample_steps > 0:
            sheet = partial(_sheet, on_sample, 0, ema)
        rehearse(
            state,
            out,
            on_main=partial(on_main, accelerator=accelerator),
            sheet=sheet,
            setup=setup,
        )
    if setup is not None and accelerator.is_main_process:
        replace_folder(out / SETUP, setup)
    log = _Log(out / LOG, first, lines=state.logged, enabled=accelerator.is_main_process)
    if settings.trackers:
        accelerator.init_trackers(out.name)

    batches = iter(loader)
    bar = tqdm(
        total=settings.max_steps,
        initial=first,
        unit="step",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
        mininterval=1.0,
    )
    not_finite = 0  # steps on end whose gradient was not
    with _stop_signals() as stop, bar:
        (spent,) = _agreed((stage.is_spent,), accelerator)
        for step in range(first, settings.max_steps):
            if spent:
                break
            started = time.perf_counter()
            micro = [next(batches) for _ in range(settings.gradient_accumulation_steps)]
            waited = time.perf_counter() - started
            rate = settings.schedule.factor(step, settings.max_steps)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak"] * rate
            losses, norm, load = _step(model, stage, optimizers, micro, accelerator, settings, step)
            if norm is not None and math.isfinite(norm):
                ema.update()
            else:
                state.skipped += 1
            not_finite = 0 if norm is None or math.isfinite(norm) else not_finite + 1
            if not_finite == NOT_FINITE:
                raise ValueError(
                    f"the gradient norm was not finite in {not_finite} steps on end, up to step "
                    f"{step + 1}; go on from a checkpoint in {out} with a lower learning rate"
                )
            bar.update()

            done = step + 1
            *asked, spent = _agreed((*stop.asked(), stage.is_spent), accelerator)
            stopping = any(asked)
            last = spent or done == settings.max_steps
            logging = last or done % settings.logging_steps == 0
            saving = last or stopping or done % settings.save_steps == 0
            # Behind what waits for a GPU: the other processes, and the norm of a logged step.
            meter.add(load, seconds=time.perf_counter() - started, waited=waited)
            if logging:
                means = _means(losses, accelerator)
                entry = {
                    **{f"loss/{name}": value for name, value in means.items()},
                    "grad_norm": norm or 0.0,
                    "learning_rate": optimizers[0].param_groups[0]["lr"],
                    "seconds": round(time.perf_counter() - started, 4),
                    **meter.read(),
                    **stage.statistics(),
                    **({"skipped_steps": state.skipped} if state.skipped else {}),
                }
                log.write(done, entry)
                accelerator.log(entry, step=done)
                bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
            if settings.sample_steps and on_sample and (done % settings.sample_steps == 0 or last):
                if accelerator.is_main_process:
                    _sheet(on_sample, done, ema)
                accelerator.wait_for_everyone()
            if saving:
                state.step, state.logged = done, log.lines
                checkpoints.save(done, state.write)
            if stopping and not last:
                checkpoints.finish()
                accelerator.end_training()
                number = next(each for each, held in zip(SIGNALS, asked, strict=True) if held)
                stopped = Stopped(done, number)
                accelerator.print(stopped, file=sys.stderr)
                raise stopped
        checkpoints.finish()
    ema.copy_to_parameters()
    trained = _state_of(stage)
    accelerator.end_training()
    return trained


def _check_fits(stage: Stage, settings: TrainingConfig, device: torch.device) -> None:
    """Raise ValueError where what learns, and all that is kept beside it, is larger than memory."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return  # each process holds a part
    learning = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    count, weights = sum(p.numel() for p in learning), sum(p.nbytes for p in learning)
    needs = {
        "weights": sum(parameter.nbytes for parameter in stage.parameters()),
        "gradients": weights,
        "optimizer states": settings.optimizer.state_bytes * count,
        "averages": 4 * count if settings.ema else 0,
    }
    mend = "the model (or train `lora`, without training.ema)"
    check_room("training", needs, mend=mend, device=device)


def _state_of(stage: Stage) -> dict[str, Tensor]:
    """The whole state dict of a stage on the CPU; of one with a quantized base what has learnt."""
    if any(is_quantized(parameter) for parameter in stage.parameters()):
        return {n: p.detach().cpu() for n, p in stage.named_parameters() if p.requires_grad}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(stage, options=options))


def _sheet(on_sample: Callable[[int], None], step: int, ema: ExponentialMovingAverage) -> None:
    """Draw a sheet with the averaged weights."""
    with ema.applied():
        on_sample(step)


def launched() -> PartialState:
    """Which process this is, among how many and on which device, before `fit` is called."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


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
    loads = [stage.load(*pair) for pair in zip(micro, noises, strict=True)]
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


def _means(losses: dict[str, tuple[Tensor, Tensor]], accelerator: Accelerator) -> dict[str, float]:
    sums = accelerator.reduce({name: total for name, (total, _) in losses.items()}, "sum")
    return {name: float(sums[name] / count.clamp_min(1)) for name, (_, count) in losses.items()}


def _check_trackers(names: tuple[str, ...], accelerator: Accelerator) -> None:
    """accelerate leaves out a tracker that is not installed, without a word."""
    for name in names:
        if name not in map(str, accelerator.log_with):
            raise ValueError(f"tracker {name!r} is not installed: pip install {name}")


def _check_sharding(
    optimizers: list[torch.optim.Optimizer], settings: TrainingConfig, accelerator: Accelerator
) -> None:
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded and not accelerator.is_fsdp2:
        raise ValueError("FSDP of version 1 is not supported: launch with --fsdp_version 2")
    if sharded and (len(optimizers) > 1 or settings.sample_steps):
        raise ValueError(
            "sharded weights (FSDP): Muon and sample sheets need whole matrices on one process; "
            "choose AdamW and sample_steps: 0, or launch without FSDP"
        )


def precision(name: str) -> str:
    """What "auto" stands for here; any other name for itself."""
    if name == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return name


class _Log:
    """One JSON line a logged step; lines beyond the step a run continues from are dropped.

    lines  that there are; as the step a run continues from knows it, where they are read. Raises
           ValueError for a folder in the place of the file
    """

    def __init__(self, path: Path, first: int, *, lines: int, enabled: bool) -> None:
        self.path, self.enabled, self.lines = path, enabled, lines
        if not enabled:
            return
        if path.is_dir():
            raise ValueError(f"{path} is a folder; move it away, or train into another one")
        path.parent.mkdir(parents=True, exist_ok=True)
        found = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = [line for line in found if _logged_step(line) in range(1, first + 1)]
        if len(kept) < lines:
            print(
                f"warning: {path} lacks {lines - len(kept)} of its {lines} lines of the {first} "
                "steps that were done; the run goes on without them",
                file=sys.stderr,
            )
        self.lines = len(kept)
        beside = path.with_name(f"{path.name}.part")
        beside.write_text("".join(f"{line}\n" for line in kept))
        os.replace(beside, path)

    def write(self, step: int, entry: dict[str, float]) -> None:
        self.lines += 1
        if self.enabled:
            known = {
                k: v if math.isfinite(v) else None for k, v in entry.items()
            }  # JSON has no NaN
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **known}) + "\n")


def _logged_step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be torn
        return -1


class Stopped(SystemExit):
    """A run that a signal ended; its status is the one that a shell gives to the signal."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        super().__init__(f"stopped at step {step}; the same command continues from there")
        self.code = 128 + number


class _Stop:
    """The signal that asked for a stop, if one did."""

    number: int | None = None

    def asked(self) -> tuple[bool, ...]:
        return tuple(number == self.number for number in SIGNALS)


def on_main(check: Callable[[], None], *, accelerator: Accelerator) -> None:
    """Let the main process check something; raise its ValueError on all processes."""
    said: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            check()
        except ValueError as error:
            said = [str(error)]
    broadcast_object_list(said)
    if said[0] is not None:
        raise ValueError(said[0])


def _agreed(asked: tuple[bool, ...], accelerator: Accelerator) -> tuple[bool, ...]:
    """Whether each holds on any process: a signal or a clock reaches them at different steps."""
    if accelerator.num_processes == 1:
        return asked
    numbers = torch.tensor(asked, dtype=torch.int64, device=accelerator.device)
    return tuple(bool(one) for one in accelerator.reduce(numbers, reduction="sum"))


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Signals ask for a stop at the end of the step; a second Ctrl-C stops at once.

    One that is ignored stays so, as SIGHUP is under nohup.
    """
    stop = _Stop()

    def ask(number: int, frame: object) -> None:
        if stop.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.number = number

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    try:
        previous = {number: signal.signal(number, ask) for number in heard}
    except ValueError:  # not the main thread: the caller handles signals
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
