"""The one training loop, over accelerate. A killed run goes on as if it had not been."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm

from data_pipelines.room import check_room
from mmdlm.models.checkpoints.run_steps import SETUP
from mmdlm.models.quantization import is_quantized
from train.checkpoints.checkpoint import Checkpoints, latest, replace_folder
from train.checkpoints.manifest import check_newest
from train.checkpoints.record import Record
from train.checkpoints.rehearsal import rehearse
from train.checkpoints.run_state import RunState
from train.log import LOG, Log
from train.optimizer import (
    ExponentialMovingAverage,
)
from train.optimizer_step import means_of, take_step
from train.stages.meter import Meter
from train.stages.stage import Loader, Stage
from train.stopping import agreed, end_early, stop_signals
from train.training_config import TrainingConfig, precision

NOT_FINITE = 10  # steps on end without a finite gradient, after which a run stops all the same


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

    on_main(partial(check_newest, out), accelerator=accelerator)
    first = _continue(state, stage, out, settings, record)
    if first is None:
        first = 0
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
    log = Log(out / LOG, first, lines=state.logged, enabled=accelerator.is_main_process)
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
    with stop_signals() as stop, bar:
        (spent,) = agreed((stage.is_spent,), accelerator)
        for step in range(first, settings.max_steps):
            if spent:
                break
            started = time.perf_counter()
            micro_batches = [next(batches) for _ in range(settings.gradient_accumulation_steps)]
            waited = time.perf_counter() - started
            _set_rates(optimizers, settings.schedule.factor(step, settings.max_steps))
            losses, norm, load = take_step(
                model, stage, optimizers, micro_batches, accelerator, settings, step
            )
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
            *asked, spent = agreed((*stop.asked(), stage.is_spent), accelerator)
            stopping = any(asked)
            last = spent or done == settings.max_steps
            logging = last or done % settings.logging_steps == 0
            saving = last or stopping or done % settings.save_steps == 0
            # Behind what waits for a GPU: the other processes, and the norm of a logged step.
            meter.add(load, seconds=time.perf_counter() - started, waited=waited)
            if logging:
                means = means_of(losses, accelerator)
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
                state.step, state.logged = done, log.lines
                checkpoints.save(done, state.write)
            if stopping and not last:
                checkpoints.finish()
                raise end_early(done, asked, accelerator)
        checkpoints.finish()
    ema.copy_to_parameters()
    trained = _state_of(stage)
    accelerator.end_training()
    return trained


def _continue(
    state: RunState, stage: Stage, out: Path, settings: TrainingConfig, record: Record
) -> int | None:
    """Read the newest checkpoint of a run.

    Returns:
        Its step; None where there is no checkpoint.

    Raises:
        ValueError: It is damaged, beyond the last step, or of other settings.
    """
    found = latest(out)
    if found is None:
        return None
    path, first = found
    if first > settings.max_steps:
        raise ValueError(
            f"{path} is beyond the {settings.max_steps} steps of this run; give "
            f"training.max_steps at least {first}, or train into another folder"
        )
    state.read(path, step=first)
    written = any((out / name).is_dir() for name in ("final", "adapter"))
    done_before = (first == settings.max_steps or stage.is_spent) and written
    print_once = state.accelerator.print
    for said in record.check(path, finished=done_before):
        print_once(f"going on with another setting than {path}: {said}")
    print_once(f"continuing from {path} at step {first} of {settings.max_steps}")
    return first


def _set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set each learning rate to a factor of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


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
    """Return the state dict of a stage on the CPU; on a quantized base only what was trained."""
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


def _check_trackers(names: tuple[str, ...], accelerator: Accelerator) -> None:
    """Raise for a tracker that is not installed, which accelerate would leave out silently."""
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
