"""All that a run continues from, as the files of one checkpoint; reading them runs no code."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdlm.models.checkpoints.run_steps import AVERAGES, SHARDED, WEIGHTS
from train.checkpoints.frozen_params import Frozen
from train.checkpoints.manifest import seal
from train.checkpoints.record import Record
from train.checkpoints.sharded import ShardedState
from train.optimizer import ExponentialMovingAverage

SKIPPED, PROGRESS = "skipped_steps.txt", "progress.json"


class Stateful(Protocol):
    """What says where it is, in plain containers of numbers, texts and tensors, and goes there."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RunState:
    """Weights, averages, optimizers, generators and data: each process calls the same of it."""

    def __init__(
        self,
        accelerator: Accelerator,
        optimizers: list[torch.optim.Optimizer],
        loader: Stateful,
        ema: ExponentialMovingAverage,
        stage: nn.Module,
        *,
        record: Record,
    ) -> None:
        self.accelerator, self.optimizers, self.loader = accelerator, optimizers, loader
        self.ema, self.stage, self.record = ema, stage, record
        self.skipped = 0  # steps that left the weights alone
        self.step = self.logged = 0  # steps that are done, and lines of the log
        self.sharded, self.frozen = None, None
        if accelerator.distributed_type == DistributedType.FSDP:
            self.sharded = ShardedState(stage, optimizers, ema)
        else:
            self.frozen = Frozen.of(stage)

    def write(self, folder: Path) -> Callable[[], None] | None:
        """Fill a folder; sharded weights are written while the run goes on, see `Checkpoints`."""
        number = self.accelerator.process_index
        torch.save(self.loader.state_dict(), folder / f"loader_{number}.pt")
        torch.save(_generators(), folder / f"random_states_{number}.pkl")
        if self.accelerator.is_main_process:
            (folder / SKIPPED).write_text(f"{self.skipped}\n")
            progress = {"step": self.step, "logged": self.logged}
            (folder / PROGRESS).write_text(json.dumps(progress) + "\n")
            self.record.write(folder)
        if self.sharded is not None:
            rest = self.sharded.write(folder)
            return lambda: self._seal(folder, after=rest)
        if self.accelerator.is_main_process:
            self._write_whole(folder)
        self.accelerator.wait_for_everyone()
        self._seal(folder)
        return None

    def read(self, folder: Path, *, step: int) -> None:
        """Read everything but the options of the optimizers, which stay as they were set.

        Args:
            folder: The checkpoint.
            step: That the folder is named after.

        Raises:
            ValueError: Where the files are of another run, or of another step.
        """
        self._read_progress(folder, step)
        number, processes = self.accelerator.process_index, self.accelerator.num_processes
        stored = len(list(folder.glob("loader_*.pt")))
        if stored != processes:
            raise ValueError(
                f"{folder} was written by {stored} processes and cannot be continued exactly by "
                f"{processes}; start as many, or a new run from its weights"
            )
        if (folder / SHARDED).is_dir() != (self.sharded is not None):
            how = "without FSDP" if self.sharded is not None else "under FSDP"
            raise ValueError(
                f"{folder} was written {how}; launch likewise, or start a new run from its weights"
            )
        if self.frozen is not None:
            self.frozen.check(folder)
        options = [{k: v for k, v in group.items() if k != "params"} for group in self._groups()]
        try:
            if self.sharded is not None:
                self.sharded.read(folder)
            else:
                self._read_whole(folder)
            generators = _load(folder / f"random_states_{number}.pkl")
            position = _load(folder / f"loader_{number}.pt")
            _set_generators(generators)
            self.skipped = int((folder / SKIPPED).read_text())
        except Exception as error:  # whatever a file may hold
            raise ValueError(
                f"{folder} does not fit this run ({' '.join(str(error).split())[:300]}); set the "
                "model and the optimizer back to what they were, or train into another folder"
            ) from error
        for group, option in zip(self._groups(), options, strict=True):
            group.update(option)
        try:
            self.loader.load_state_dict(position)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{folder}: the position in the data is of another kind of run ({error!r}); train "
                "into another folder"
            ) from error

    def _read_progress(self, folder: Path, step: int) -> None:
        self.step = step
        if not (folder / PROGRESS).is_file():  # of a version that wrote none
            return
        progress = json.loads((folder / PROGRESS).read_text())
        if progress["step"] != step:
            raise ValueError(
                f"{folder} holds step {progress['step']}, not {step}; give it back its name, "
                f"step_{progress['step']:08d}"
            )
        self.logged = int(progress["logged"])

    def _write_whole(self, folder: Path) -> None:
        """Write what the main process holds as well as any other."""
        weights = {name: tensor.contiguous() for name, tensor in self._weights().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        if self.frozen is not None:
            self.frozen.write(folder)
        for path, optimizer in self._optimizers(folder):
            torch.save(optimizer.state_dict(), path)
        state = self.ema.state_dict()
        averages: Any = state["averages"]
        named = dict(zip(self._learning(), averages, strict=False))
        save_file(
            named, folder / AVERAGES, metadata={"format": "pt", "updates": str(state["updates"])}
        )

    def _read_whole(self, folder: Path) -> None:
        weights = self._weights()
        stored, _ = _tensors(folder / WEIGHTS)
        _check_alike(stored, weights)
        averages, about = _tensors(folder / AVERAGES)
        state = self.ema.state_dict()
        own: Any = state["averages"]
        named = dict(zip(self._learning(), own, strict=False))
        _check_alike(averages, named)
        states = [(optimizer, _load(path)) for path, optimizer in self._optimizers(folder)]
        with torch.no_grad():
            for name, tensor in weights.items():
                tensor.copy_(stored[name])
        updates = int(about["updates"])
        self.ema.load_state_dict({"updates": updates, "averages": [averages[n] for n in named]})
        for optimizer, state in states:
            optimizer.load_state_dict(state)

    def _seal(self, folder: Path, *, after: Callable[[], None] = lambda: None) -> None:
        after()
        if self.accelerator.is_main_process:
            seal(folder)

    def _weights(self) -> dict[str, Tensor]:
        """Return the tensors that only the stage holds; a tied tensor under its first name."""
        frozen = self.frozen.names if self.frozen is not None else frozenset()
        found: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self.stage.state_dict(keep_vars=True).items():
            found.setdefault(id(tensor), (name, tensor.detach()))
        return {name: tensor for name, tensor in found.values() if name not in frozen}

    def _learning(self) -> list[str]:
        return [name for name, p in self.stage.named_parameters() if p.requires_grad]

    def _optimizers(self, folder: Path) -> list[tuple[Path, torch.optim.Optimizer]]:
        ends = ("", *(f"_{number}" for number in range(1, len(self.optimizers))))
        paths = [folder / f"optimizer{end}.bin" for end in ends]
        return list(zip(paths, self.optimizers, strict=True))

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]


def _load(path: Path) -> Any:
    """Tensors in plain containers; torch's restricted unpickler refuses everything else."""
    return torch.load(path, map_location="cpu", weights_only=True)


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and its metadata."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def _check_alike(stored: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise ValueError for tensors that are missing, not known, or of another shape or type."""

    def kind(tensor: Tensor | None) -> str:
        return "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"

    for name in sorted(stored.keys() | own.keys()):
        stored_kind, own_kind = kind(stored.get(name)), kind(own.get(name))
        if stored_kind != own_kind:
            raise ValueError(f"{name} is {stored_kind} there and {own_kind} here")


@contextmanager
def unmoved_generators() -> Iterator[None]:
    """Leave the generators that belong to nobody as they were before the block."""
    state = _generators()
    try:
        yield
    finally:
        _set_generators(state)


def _generators() -> dict[str, Any]:
    """States of the generators that belong to nobody: what users plug in may draw from them."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one
    assert isinstance(keys, np.ndarray)
    state = {
        "python": random.getstate(),
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_generators(state: dict[str, Any]) -> None:
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for device, one in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one, device)
