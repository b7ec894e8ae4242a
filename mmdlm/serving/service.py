"""Carry out requests in threads of a bounded number, whose calls are batched by steps."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from mmdlm.core.sampling.output import SampleStep
from mmdlm.pipeline.generation_run import GenerationRun
from mmdlm.pipeline.model import Model
from mmdlm.serving.errors import ApiError
from mmdlm.serving.metrics import Metrics
from mmdlm.serving.settings import ServerSettings
from mmdlm.serving.step_batcher import GivenUpError, StepBatcher, Ticket

Result = TypeVar("Result")


@dataclass
class Watch:
    """A `Runner` of one request, which keeps what its runs came to.

    Attributes:
        batcher: Carries out the runs.
        ticket: By which the request is given up.
        ends: Each run, and its last state.
    """

    batcher: StepBatcher
    ticket: Ticket
    ends: list[tuple[GenerationRun, SampleStep]] = field(default_factory=list)

    def __call__(self, run: GenerationRun, *, every_step: bool) -> Iterator[SampleStep]:
        """Carry out a run, see `Runner`."""
        latest = None
        try:
            for latest in self.batcher(run, every_step=every_step, ticket=self.ticket):
                yield latest
        finally:
            if latest is not None:
                self.ends.append((run, latest))


@dataclass(frozen=True)
class Work:
    """What a request has to work with in its thread.

    Attributes:
        model: Whose calls are batched with those of others.
        watch: Of its runs.
    """

    model: Model
    watch: Watch


class Service:
    """A model, the threads that ask it, and the bound on how many do.

    Args:
        model: To serve.
        settings: Its limits.
        metrics: Of the server.
    """

    def __init__(self, model: Model, settings: ServerSettings, metrics: Metrics) -> None:
        self.model, self.settings, self.metrics = model, settings, metrics
        self.batcher = StepBatcher(max_rows=settings.max_batch_size, observe=metrics.observe)
        self.capacity = settings.max_batch_size + settings.max_queue
        self._pool = ThreadPoolExecutor(self.capacity, thread_name_prefix="mmdlm-request")
        self._active = 0
        self._seconds = 1.0  # that a request takes, smoothed
        metrics.active.set_function(lambda: float(self._active))
        metrics.waiting.set_function(lambda: float(self.batcher.waiting))
        metrics.rows.set_function(lambda: float(self.batcher.running))

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken."""
        return self._active < self.capacity and self.batcher.is_alive

    def close(self) -> None:
        """Finish the requests that there are, and end all threads."""
        self._pool.shutdown(wait=True)
        self.batcher.close()

    async def call(self, http: HttpRequest, task: Callable[[Work], Result]) -> Result:
        """Run a task in a thread of its own.

        Args:
            http: The request that it is for: when its client leaves, the task is given up.
            task: What to do.

        Returns:
            What the task returns.

        Raises:
            ApiError: With status 429 if there are too many.
        """
        with self._admitted() as work:
            future = asyncio.wrap_future(self._pool.submit(task, work))
            gone = asyncio.create_task(_gone(http))
            both: set[asyncio.Future[Any]] = {future, gone}
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not future.done():
                    raise GivenUpError("the client has left")
                return future.result()
            finally:
                gone.cancel()
                work.watch.ticket.give_up()
                if not future.done():  # it still counts until it has noticed
                    with suppress(Exception):
                        await future

    async def stream(
        self, http: HttpRequest, task: Callable[[Work], Iterator[Result]]
    ) -> AsyncIterator[Result]:
        """Yield what a task yields in a thread of its own.

        The task is given up when the iterator is closed, and when the client leaves before there
        is anything to yield.

        Args:
            http: The request that it is for.
            task: What to do.

        Yields:
            Its items.

        Raises:
            ApiError: With status 429 if there are too many.
        """
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Result | None]()

        def work_off(work: Work) -> None:
            try:
                if (reason := work.watch.ticket.reason()) is not None:
                    raise reason  # given up before its turn came
                for item in task(work):
                    loop.call_soon_threadsafe(items.put_nowait, item)
            finally:
                loop.call_soon_threadsafe(items.put_nowait, None)

        with self._admitted() as work:
            future = self._pool.submit(work_off, work)
            gone = asyncio.create_task(_gone(http))
            gone.add_done_callback(lambda _: items.put_nowait(None))
            try:
                while (item := await items.get()) is not None:
                    yield item
                if gone.done() and not gone.cancelled():
                    raise GivenUpError("the client has left")
                await asyncio.wrap_future(future)
            finally:
                gone.cancel()
                work.watch.ticket.give_up()
                if not future.cancel():  # it still counts until it has noticed
                    with suppress(Exception):
                        await asyncio.wrap_future(future)

    @contextmanager
    def _admitted(self) -> Iterator[Work]:
        if self._active >= self.capacity:
            wait = math.ceil(self._seconds * self._active / self.settings.max_batch_size)
            raise ApiError(
                429,
                f"the server has {self._active} requests and takes no more; try again in "
                f"{wait} seconds",
                code="queue_full",
                retry_after=max(1, wait),
            )
        self._active += 1
        began = time.monotonic()
        watch = Watch(self.batcher, Ticket(began + self.settings.timeout))
        try:
            yield Work(replace(self.model, runner=watch), watch)
        finally:
            self._active -= 1
            self._seconds += 0.1 * (time.monotonic() - began - self._seconds)


async def _gone(http: HttpRequest) -> None:
    """Return when the client of a request, whose body was read, has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
