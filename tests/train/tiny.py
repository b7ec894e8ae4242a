"""A stage whose gradient is known by formula, its data, and runs in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import DistributedType, PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter

from train import loop
from train.log import LOG
from train.loop import fit
from train.optimizer import NO_RATES, Optimizer, Rates
from train.stages.meter import MEASURED
from train.stages.stage import Stage
from train.training_config import TrainingConfig

WIDTH = 3
KINDS = ("text", "image")


class Regression(Stage):
    """Two squared errors of one linear map; rows whose first entry is positive count as text.

    The number of text rows differs from batch to batch, so that a mean of means is wrong.
    """

    coefficients: ClassVar = {"text": 1.0, "image": 0.5}

    def __init__(self, *, noisy: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)
        self.noisy = noisy
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[0.5, -1.0, 0.25]]))
            self.linear.bias.fill_(0.1)

    def draw(self, batch: Tensor, *, generator: torch.Generator) -> Tensor:
        return torch.randn(len(batch), generator=generator) * self.noisy

    def counts(self, batch: Tensor, noise: Tensor) -> dict[str, Tensor]:
        return {kind: where.sum() for kind, where in self.rows(batch).items()}

    def forward(self, batch: Tensor, noise: Tensor) -> dict[str, Tensor]:
        error = (self.linear(batch).squeeze(-1) - batch[:, 1] - noise).square()
        return {kind: (error * where).sum() for kind, where in self.rows(batch).items()}

    @staticmethod
    def rows(batch: Tensor) -> dict[str, Tensor]:
        return dict(zip(KINDS, (batch[:, 0] > 0, batch[:, 0] <= 0), strict=True))


class Rows:
    """Rows that follow from their number alone; `on_batch` is told which batch comes next."""

    def __init__(
        self,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        on_batch: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.on_batch = on_batch
        self.given = 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.on_batch(self.given)
            start = (self.given * self.world_size + self.rank) * self.batch_size
            self.given += 1
            yield torch.stack([row(number) for number in range(start, start + self.batch_size)])

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


def row(number: int) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(number))


@dataclass(frozen=True)
class Plain(Optimizer):
    """Gradient descent, so that a step shows the gradient."""

    learning_rate: float = 0.1
    momentum: float = 0.0

    def build(self, module: nn.Module, *, rates: Rates = NO_RATES) -> list[torch.optim.Optimizer]:
        groups = [{"params": list(module.parameters()), "peak": self.learning_rate}]
        return [torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum)]


def settings(**options: Any) -> TrainingConfig:
    """Every step is logged, and the trained weights are kept as they are."""
    defaults = {
        "max_steps": 8,
        "optimizer": Plain(),
        "max_grad_norm": 1e6,
        "ema": 0.0,
        "save_steps": 3,
        "logging_steps": 1,
    }
    return TrainingConfig(**{**defaults, **options})


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def trajectory(out: Path) -> list[str]:
    """Every logged number but the timings, to the last digit."""
    return [
        json.dumps({k: v for k, v in entry.items() if k not in MEASURED}) for entry in logged(out)
    ]


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


# ---- runs in processes of their own -------------------------------------------------------------


class Run:
    """A function in a process that is forked from one that has imported everything.

    Its standard error lands in `errors`.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any, folder: Path) -> None:
        self.errors = folder / f"stderr_{len(list(folder.glob('stderr_*')))}.txt"
        self.errors.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train.pretrain", "tests.train.tiny"])
        self.process = context.Process(target=_run, args=(self.errors, function, arguments))
        self.process.start()

    def exit_code(self) -> int:
        """Wait for it; -N where signal N ended it."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


def _run(errors: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with errors.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    function(*arguments)


def pretrain(arguments: list[str], killed_before: str | None = None) -> None:
    """`python -m train.pretrain ARGUMENTS`; killed as it is about to rename to a path ending so."""
    from train.pretrain import main

    _recipe(main, arguments, killed_before)


def sft(arguments: list[str], killed_before: str | None = None) -> None:
    """The same of `python -m train.sft`."""
    from train.sft import main

    _recipe(main, arguments, killed_before)


def preference(arguments: list[str], killed_before: str | None = None) -> None:
    """The same of `python -m train.preference`."""
    from train.preference import main

    _recipe(main, arguments, killed_before)


def own_images(arguments: list[str], killed_before: str | None = None) -> None:
    """The same of `python -m train.own_images`."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from train.own_images import main

    _recipe(main, arguments, killed_before)


def _recipe(main: Callable[..., None], arguments: list[str], killed_before: str | None) -> None:
    from mmdlm.cli.recipe import run

    replace = os.replace

    def deadly(source: Any, target: Any) -> None:
        if str(target).endswith(killed_before or ""):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    if killed_before:
        os.replace = deadly
    sys.argv = ["recipe", *arguments]
    run(main)


def be_one_of_two(rank: int, port: int) -> None:
    """Tell accelerate that this is one process of two, on a CPU."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }


def shard_weights(wrap: str = "NO_WRAP") -> None:
    """Let accelerate shard as on GPUs (FSDP2); on a CPU it would not, though torch can."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_AUTO_WRAP_POLICY": wrap,
    }
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def write_slowly(seconds: float) -> None:
    """Checkpoints of sharded weights take so long to write."""
    write = FileSystemWriter.write_data

    def slowly(*given: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return write(*given, **named)

    FileSystemWriter.write_data = slowly


@dataclass(frozen=True)
class Circumstances:
    """Of a process.

    stopped_at  SIGTERM reaches it as it takes this batch
    killed_at   and SIGKILL this one; `meanwhile_RANK.json` then names the folders half written
    sharded     weights are
    slowness    seconds that sharded weights take to write
    wider       the stage has a parameter more
    unrehearsed nothing is tried before the first step
    """

    stopped_at: int | None = None
    killed_at: int | None = None
    sharded: bool = False
    slowness: float = 0.0
    wider: bool = False
    unrehearsed: bool = False


def fit_one_of_two(
    rank: int, port: int, out: Path, options: dict[str, Any], how: Circumstances
) -> None:
    """One process of a run of two."""
    be_one_of_two(rank, port)
    if how.sharded:
        shard_weights()
    if how.slowness:
        write_slowly(how.slowness)
    if how.unrehearsed:
        loop.rehearse = lambda *given, **named: None

    def on_batch(number: int) -> None:
        if number == how.killed_at:
            parts = [path.name for path in out.glob("*.part")]
            (out / f"meanwhile_{rank}.json").write_text(json.dumps(parts))
            torch.distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == how.stopped_at:
            os.kill(os.getpid(), signal.SIGTERM)

    stage = Regression()
    if how.wider:
        stage.more = nn.Parameter(torch.zeros(4))
    with suppress(SystemExit):
        whole = fit(
            stage,
            Rows(2, rank=rank, world_size=2, on_batch=on_batch),
            settings=settings(**options),
            out=out,
        )
        weights = whole if how.sharded else stage.state_dict()
        torch.save(weights, out / f"weights_{rank}.pt")
