"""Batches that worker processes make ahead, in an order that does not depend on them, resumable.

torchdata's StatefulDataLoader would do the part of the workers, but it reaches into the internals
of torch's DataLoader and is no longer kept up with torch; here each batch simply brings along the
state that its worker has after it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipelines.shards.sample_stats import State
from data_pipelines.shards.stream import Reader


class Batches(Protocol):
    """What one worker makes; each batch has torch's `pin_memory`."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> State:
        """Position after the batch that was yielded last, and the tally of each of "sources"."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Continue with the batch that followed that position."""
        ...


MakeBatches = Callable[[Reader], Batches]
# The least that a number of a loader may be.
_LEAST = {"batch_size": 1, "length": 1, "num_workers": 0, "shuffle_buffer": 0, "cache_bytes": 0}


def workers_for(num_workers: int | None, *, on_gpu: bool) -> int:
    """So many; None: two where a GPU would wait for batches, and none elsewhere."""
    return (2 if on_gpu else 0) if num_workers is None else num_workers


def check_numbers(numbers: Mapping[str, Any]) -> None:
    """Raise ValueError for one that is out of its range; all have their names in `build_loader`."""
    for name, least in _LEAST.items():
        if name in numbers and numbers[name] < least:
            raise ValueError(f"{name} is {numbers[name]}; it must be {least} or more")
    if not 0 <= numbers["max_broken"] <= 1:
        raise ValueError(f"max_broken is {numbers['max_broken']}; a share lies in [0, 1]")
    rank, world_size = numbers["rank"], numbers["world_size"]
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it must be 0 ... {world_size - 1}")


class Loader:
    """An iterable of batches whose state says which one comes next.

    `state_dict()` covers the batches that were given out, not those that workers hold ready. It
    belongs to one process (rank): each saves and loads its own. Iterating again goes on from the
    state; after the end of a single pass it starts over.

    Args:
        make: Batches of a worker, by which of all readers it is.
        settings: What the samples follow from: a state is good where they are the same. They hold
            the number of "shards" of each source, "rank" and "world_size", and "num_workers" that
            read ahead; with 0 this process reads.
        pin_memory: Whether workers give out batches in page-locked memory.
    """

    def __init__(self, make: MakeBatches, settings: State, *, pin_memory: bool) -> None:
        self.make = make
        self.settings = settings
        self.num_workers = settings["num_workers"]
        self.pin_memory = pin_memory
        own = max(1, self.num_workers)
        first, count = own * settings["rank"], own * settings["world_size"]
        self._readers = [Reader(first + worker, count) for worker in range(own)]
        self._reset()

    def _reset(self) -> None:
        self._next = 0  # the worker whose turn it is
        self._workers: list[State | None] = [None] * len(self._readers)

    def __iter__(self) -> Iterator[Any]:
        if self.num_workers == 0:
            parts: Iterable[_Part] = _parts(self.make, 0, self._readers[0], self._workers[0])
        else:
            parts = DataLoader(
                _WorkerDataset(self.make, self._readers, list(self._workers), self._next),
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory and torch.cuda.is_available(),
            )
        for part in parts:
            if part.error is not None:
                raise part.error
            assert part.batch is not None
            self._workers[part.worker] = part.state
            self._next = (part.worker + 1) % len(self._workers)
            yield part.batch
        if not any(self._workers) and self.settings["world_size"] == 1:
            raise ValueError("the shards hold no sample that can be used; see what was skipped")
        self._reset()

    def state_dict(self) -> State:
        """Where the data stands, as JSON can hold it."""
        return copy.deepcopy(
            {"settings": self.settings, "next": self._next, "workers": self._workers}
        )

    def load_state_dict(self, state: State) -> None:
        """Go on where another loader with the same settings stood; call before iterating.

        Raises ValueError where the settings differ, as then other samples would follow.
        """
        if "settings" not in state:
            raise ValueError(
                "the data cannot go on where it stood: its state is of another version; start a "
                "new run from the weights"
            )
        differing = [
            f"{name} was {state['settings'].get(name)} and is {value}"
            for name, value in self.settings.items()
            if state["settings"].get(name) != value
        ]
        if differing:
            raise ValueError(
                f"the data cannot go on where it stood: {'; '.join(differing)}. Set them back, or "
                "start a new run from the weights"
            )
        state = copy.deepcopy(state)
        self._next, self._workers = state["next"], state["workers"]

    def stats(self) -> list[dict[str, Any]]:
        """For each source: how many samples were good and broken so far, and which were broken.

        Batches may come from samples that were read ahead, and counted.
        """
        totals: list[dict[str, Any]] = [
            {"good": 0, "broken": 0, "listed": []} for _ in self.settings["shards"]
        ]
        for worker in self._workers:
            for total, source in zip(totals, worker["sources"] if worker else [], strict=False):
                for name in total:
                    total[name] += source["stats"][name]
        return totals


@dataclass(frozen=True)
class _Part:
    """What a worker hands over: a batch and the state after it, or what stopped it."""

    worker: int
    batch: Any = None
    state: State | None = None
    error: Exception | None = None

    def pin_memory(self) -> _Part:
        """Pin the memory of the tensors; torch's DataLoader calls this hook."""
        return replace(self, batch=None if self.batch is None else self.batch.pin_memory())


def _parts(make: MakeBatches, worker: int, reader: Reader, state: State | None) -> Iterator[_Part]:
    """Batches of one worker from a state on, each with the state after it."""
    batches = make(reader)
    if state is not None:
        batches.load_state_dict(state)
    for batch in batches:
        yield _Part(worker, batch, batches.state_dict())


class _WorkerDataset(IterableDataset[_Part]):
    """DataLoader asks its workers in turn from the first; after resuming, another is the first."""

    def __init__(
        self, make: MakeBatches, readers: list[Reader], states: list[State | None], first: int
    ) -> None:
        self.make = make
        self.readers = readers
        self.states = states
        self.first = first

    def __iter__(self) -> Iterator[_Part]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
        info = get_worker_info()
        assert info is not None
        worker = (info.id + self.first) % info.num_workers
        try:
            yield from _parts(self.make, worker, self.readers[worker], self.states[worker])
        except ValueError as error:  # sent as it is: DataLoader would wrap it in a traceback
            yield _Part(worker, error=ValueError(str(error)))
        except OSError as error:
            yield _Part(worker, error=OSError(str(error)))


def _as_it_is(part: Any) -> Any:
    return part
