"""Checkpoints of weights sharded over processes (FSDP2), written while training goes on."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from mmdlm.models.checkpoints.run_steps import SHARDED
from train.optimizer import ExponentialMovingAverage

RECORDS = (
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
)


class ShardedState:
    """Weights, optimizer and average, of which each process holds a part and writes that.

    `write` and `read` are called on every process, with the same folder.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        average: ExponentialMovingAverage,
    ) -> None:
        self.module, self.optimizers, self.average = module, tuple(optimizers), average
        # Of its own: the processes talk about files while gradients go round among them.
        talk = dist.new_group(backend="gloo")
        assert isinstance(talk, dist.ProcessGroup)  # all are members
        self.talk = talk

    def write(self, folder: Path) -> Callable[[], None]:
        """Copy all of it, and begin to write the copy to `folder`.

        The result waits until every process has written its part; OSError where one could not.
        """
        writing = async_save(self._state(), checkpoint_id=folder / SHARDED, process_group=self.talk)

        def wait() -> None:
            with _plain_errors():
                cast(Future[Any], writing).result()

        return wait

    def read(self, folder: Path) -> None:
        """Continue from there; RuntimeError where it is not of this model and optimizer."""
        state = self._state()
        with _plain_errors():
            self._check_has_no_more(folder, state)
            load(
                state,
                storage_reader=_Reader(folder / SHARDED),
                planner=_Planner(),
                process_group=self.talk,
            )
        set_model_state_dict(self.module, state["model"])
        set_optimizer_state_dict(self.module, self.optimizers, state["optimizer"])
        self.average.load_state_dict(state[self._own_average])

    def _check_has_no_more(self, folder: Path, state: dict[str, Any]) -> None:
        """Raise for tensors that only the checkpoint has; torch reports only missing ones."""
        stored = _Reader(folder / SHARDED).read_metadata().state_dict_metadata
        own = f"{self._own_average}.averages."
        known = {f"model.{name}" for name in state["model"]}
        known |= {f"{own}{index}" for index in range(len(self.average.averages))}
        more = [name for name in stored if name.startswith(("model.", own)) and name not in known]
        if more:
            raise RuntimeError(f"beyond the model it holds {', '.join(more[:3])}")

    def _state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.module),
            "optimizer": get_optimizer_state_dict(self.module, self.optimizers),
            # Plain tensors: what bears one name is taken to be the same on all processes.
            self._own_average: self.average.state_dict(),
        }

    @property
    def _own_average(self) -> str:
        return f"average_{dist.get_rank()}"


# ---- torch's own classes would unpickle whatever the files hold ----------------------------------


class _Reader(FileSystemReader):
    """Reads a description of tensors and nothing else from the file of metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Return the file and the place of each tensor."""
        content = io.BytesIO((Path(self.path) / ".metadata").read_bytes())
        found = cast(metadata.Metadata, _Descriptions(content).load())
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Descriptions(pickle.Unpickler):
    """Knows the records that describe tensors, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that a record may be made of; refuse all others."""
        if module == "torch.distributed.checkpoint.metadata":
            found = vars(metadata).get(name)
            known = isinstance(found, type) and found.__module__ == module
        elif module == "torch":
            known = name == "Size" or isinstance(vars(torch).get(name), torch.dtype)
        else:
            known = f"{module}.{name}" in RECORDS
        if not known:
            raise RuntimeError(f"its metadata name {module}.{name}, which describes no tensor")
        return super().find_class(module, name)


class _Planner(DefaultLoadPlanner):
    """Reads numbers and texts beside the tensors without running code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put one of them in its place."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)  # what is left is safe to read
        plain.seek(0)
        super().load_bytes(read_item, plain)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise an error of any process as an Exception, which torch's own is not."""
    try:
        yield
    except CheckpointException as error:
        reasons = [reason for reason, _ in error.failures.values()]
        kind = OSError if any(isinstance(one, OSError) for one in reasons) else RuntimeError
        raise kind("; ".join(dict.fromkeys(map(str, reasons)))) from error
