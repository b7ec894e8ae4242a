"""Batch the calls of several threads by denoising steps: rows join and leave between two steps.

    with StepBatcher(max_rows=16) as batcher:
        served = dataclasses.replace(model, runner=batcher)
        # served.caption, served.text_to_image, ... from as many threads as you like

Each call prepares its documents in its own thread and waits. One worker thread carries out the
steps of all: rows with the same sampler are drawn together, and rows of about the same length go
through one forward pass, whatever their samplers. A row that draws from a generator of its own
gets the tokens that it gets alone; a call whose rows share a generator, or whose sampler has a
cache, keeps its rows together and has passes of its own.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch
from torch import Tensor

from mmdlm.core.sampling.denoising import Denoising, forward
from mmdlm.core.sampling.output import SampleStep
from mmdlm.pipeline.generation_run import GenerationRun

_LENGTHS_PER_OCTAVE = 3  # of rows in one pass: at most a fifth of it is padding


class GivenUpError(Exception):
    """The caller has given up the call."""


class DeadlineError(Exception):
    """The call was not finished in time."""


class ClosedError(Exception):
    """The batcher takes no more calls."""


@dataclass(eq=False)
class Ticket:
    """A call, as its caller can give it up.

    Attributes:
        deadline: Of `time.monotonic()`, when it is given up anyway; None: never.
    """

    deadline: float | None = None
    _given_up: threading.Event = field(default_factory=threading.Event)

    def give_up(self) -> None:
        """Leave the batch before the next step."""
        self._given_up.set()

    def reason(self) -> Exception | None:
        """Return why the call should not go on; None: it should."""
        if self._given_up.is_set():
            return GivenUpError("the call was given up")
        if self.deadline is not None and time.monotonic() > self.deadline:
            return DeadlineError("the call was not finished by its deadline")
        return None


@dataclass(frozen=True)
class Pass:
    """One forward pass, for those who count.

    Attributes:
        rows: Rows in it, without the other branches of guidance.
        committed: Tokens that were committed by it.
        seconds: It took, with all that follows from it.
    """

    rows: int
    committed: int
    seconds: float


@dataclass(eq=False)
class _Call:
    """A call that waits or runs.

    Attributes:
        rows: Before their first step.
        ticket: Its caller's.
        every_step: Whether the caller looks at each step.
        states: What the caller waits for: states, then None or an error.
        latest: Ids, committed targets and log-probabilities of its rows as they were seen last.
        left: Rows that are not finished.
        step: Number of the last step.
        has_ended: Whether the caller was told the end.
        is_left: Whether the caller waits no more.
    """

    rows: Denoising
    ticket: Ticket
    every_step: bool
    states: SimpleQueue[SampleStep | Exception | None] = field(default_factory=SimpleQueue)
    latest: tuple[Tensor, Tensor, Tensor] = field(init=False)
    left: int = field(init=False)
    step: int = -1
    has_ended: bool = False
    is_left: bool = False

    def __post_init__(self) -> None:
        state = self.rows.state
        self.left = len(self.rows)
        self.latest = (state.x_t.clone(), state.committed.clone(), state.log_prob.clone())

    def reason(self) -> Exception | None:
        """Return why the call should not go on; None: it should."""
        return GivenUpError("the caller waits no more") if self.is_left else self.ticket.reason()

    def see(self, number: int, group: SampleStep, row: int) -> None:
        """Copy row `row` of a group as row `number` of the call."""
        for mine, others in zip(
            self.latest, (group.ids, group.committed, group.log_prob), strict=True
        ):
            known = others[row, : mine.shape[1]]  # padding may have been cut
            mine[number, : len(known)] = known

    def tell(self) -> None:
        """Hand the caller its rows as they are."""
        ids, committed, log_prob = (one.clone() for one in self.latest)
        steps = self.rows.run.blocks.total
        self.states.put(SampleStep(ids, committed, self.step, steps, log_prob))

    def end(self, error: Exception | None = None) -> None:
        """Tell the caller that nothing follows; an error is raised there."""
        if not self.has_ended:
            self.has_ended = True
            self.states.put(error)


@dataclass(eq=False)
class _Group:
    """Rows that are drawn together, and whose they are.

    Attributes:
        rows: None of them finished, if they are separable.
        seats: Of each row its call and its number there.
    """

    rows: Denoising
    seats: list[tuple[_Call, int]]

    @property
    def calls(self) -> list[_Call]:
        """The calls in it, each once."""
        return list(dict.fromkeys(call for call, _ in self.seats))

    @property
    def octave(self) -> int:
        """What rows of about its length have in common."""
        return _octave(self.rows)

    def fail(self, error: Exception) -> None:
        """End all calls in it with an error."""
        for call in self.calls:
            call.end(error)


def _seats(call: _Call) -> list[tuple[_Call, int]]:
    return [(call, number) for number in range(len(call.rows))]


def _octave(rows: Denoising) -> int:
    return math.ceil(_LENGTHS_PER_OCTAVE * math.log2(max(rows.length, 1)))


class StepBatcher:
    """A `Runner` that carries out the runs of several threads together; close it in the end.

    Args:
        max_rows: Rows that are denoised at a time; a call with more runs when no other does.
        observe: Called after each forward pass, in the worker's thread.
    """

    def __init__(
        self, *, max_rows: int = 16, observe: Callable[[Pass], None] | None = None
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        self.max_rows = max_rows
        self._observe = observe
        self._waiting: deque[_Call] = deque()
        self._groups: list[_Group] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._worker = threading.Thread(target=self._work, name="mmdlm-steps", daemon=True)
        self._worker.start()

    def __call__(
        self, run: GenerationRun, *, every_step: bool, ticket: Ticket | None = None
    ) -> Iterator[SampleStep]:
        """Carry out a run with those of others; see `Runner`.

        Args:
            run: To carry out.
            every_step: Yield the state after each step, not only the last.
            ticket: By which the caller can give it up.

        Yields:
            The state after a step.

        Raises:
            GivenUpError: If the caller has given up.
            DeadlineError: If the deadline of the ticket has passed.
            ClosedError: If the batcher was closed.
            ValueError: As `Sampler.trajectory`.
        """
        ticket = ticket or Ticket()
        with torch.no_grad():
            rows = run.begin()
        if rows.plan.host.is_finished:
            return
        call = _Call(rows, ticket, every_step)
        with self._changed:
            if self._is_closed:
                raise ClosedError("no more calls are taken")
            self._waiting.append(call)
            self._changed.notify()
        try:
            while (state := call.states.get()) is not None:
                if isinstance(state, Exception):
                    raise state
                yield state
        finally:
            call.is_left = True

    @property
    def waiting(self) -> int:
        """Calls that wait for their first step."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows that are being denoised."""
        return sum(len(group.seats) for group in self._groups)

    @property
    def is_alive(self) -> bool:
        """Whether calls are carried out."""
        return self._worker.is_alive()

    def close(self) -> None:
        """Take no more calls, finish those that there are, and end the worker."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._worker.join()

    def __enter__(self) -> StepBatcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- in the worker's thread ---

    def _work(self) -> None:
        error: Exception = ClosedError("no more calls are taken")
        try:
            while self._admit():
                self._leave()
                for octave in sorted({group.octave for group in self._groups}):
                    self._step([one for one in self._groups if one.octave == octave])
                    self._groups = [group for group in self._groups if group.seats]
        except Exception as broken:  # nobody may wait for ever, whatever happens here
            error = broken
            raise
        finally:
            with self._changed:
                self._is_closed = True
                for call in (*self._waiting, *(one for g in self._groups for one in g.calls)):
                    call.end(error)

    def _admit(self) -> bool:
        """Let in who waits, first come, first served, as far as there is room.

        Returns:
            False when there is nothing left to do.
        """
        newcomers: list[_Call] = []
        with self._changed:
            while not (self._waiting or self._groups or self._is_closed):
                self._changed.wait()
            for call in list(self._waiting):
                if (reason := call.reason()) is not None:
                    self._waiting.remove(call)
                    call.end(reason)
            taken = self.running
            while self._waiting:
                if taken and taken + len(self._waiting[0].rows) > self.max_rows:
                    break
                newcomers.append(self._waiting.popleft())
                taken += len(newcomers[-1].rows)
        if newcomers and not self._groups:
            try:
                newcomers[0].rows.run.packed.renew()  # weights may change while nobody is served
            except Exception as error:
                for call in newcomers:
                    call.end(error)
                newcomers = []
        self._seat(newcomers)
        return bool(self._groups) or not self._is_closed

    def _seat(self, newcomers: Sequence[_Call]) -> None:
        """Put the rows of each call into a group that they can be part of, or into a new one."""
        joining: dict[_Group, list[_Call]] = {}
        for call in newcomers:
            octave = _octave(call.rows)
            for group in self._groups:
                if group.octave == octave and group.rows.joins(call.rows):
                    joining.setdefault(group, []).append(call)
                    break
            else:
                self._groups.append(_Group(call.rows, _seats(call)))
        for group, calls in joining.items():
            try:
                joined = Denoising.joined([group.rows, *(call.rows for call in calls)])
            except Exception as error:  # such as out of memory: the group goes on without them
                for call in calls:
                    call.end(error)
                continue
            group.rows = joined
            for call in calls:
                group.seats += _seats(call)

    def _leave(self) -> None:
        """Take out the rows of calls that are given up or late."""
        for group in self._groups:
            for call in group.calls:
                if (reason := call.reason()) is not None:
                    call.end(reason)
            try:
                _keep(group, [not call.has_ended for call, _ in group.seats])
            except Exception as error:
                group.fail(error)
                group.seats = []
        self._groups = [group for group in self._groups if group.seats]

    def _step(self, groups: Sequence[_Group]) -> None:
        """Take one step of groups of about one length, by one forward pass."""
        began, rows, committed = time.perf_counter(), sum(len(one.seats) for one in groups), 0
        try:
            states = forward([group.rows for group in groups])
        except Exception as error:  # such as out of memory: these calls fail, others go on
            for group in groups:
                group.fail(error)
                group.seats = []
            return
        for group, hidden in zip(groups, states, strict=True):
            try:
                group.rows = group.rows.after(hidden)
                committed += int(group.rows.state.just_committed.sum())
                _deliver(group)
            except Exception as error:  # such as an order of the user's own
                group.fail(error)
                group.seats = []
        if self._observe is not None:
            self._observe(Pass(rows, committed, time.perf_counter() - began))


def _deliver(group: _Group) -> None:
    """Hand the callers what the last step has brought, and let finished rows leave."""
    host, output = group.rows.plan.host, group.rows.output()
    unfinished, broken = host.unfinished.tolist(), host.broken.tolist()
    error: Exception | None = None
    try:
        host.refuse_broken()
    except ValueError as found:
        error = found
    ended_rows: dict[_Call, int] = dict.fromkeys(group.calls, 0)
    for row, (call, number) in enumerate(group.seats):
        if broken[row]:
            call.end(error)
        if call.every_step or not unfinished[row]:
            call.see(number, output, row)
        ended_rows[call] += not unfinished[row]
    for call, count in ended_rows.items():
        call.step += 1
        if group.rows.is_separable:
            call.left -= count
        else:  # all rows stay until the last is finished
            call.left = len(group.seats) - count
        if call.every_step or not call.left:
            call.tell()
        if not call.left:
            call.end()
    if group.rows.is_separable:
        _keep(
            group,
            [
                going_on and not call.has_ended
                for going_on, (call, _) in zip(unfinished, group.seats, strict=True)
            ],
        )
    else:
        _keep(group, [not call.has_ended for call, _ in group.seats])


def _keep(group: _Group, kept: Sequence[bool]) -> None:
    """Keep some rows of a group: all or none of those that cannot be separated."""
    if all(kept):
        return
    numbers = [row for row, stays in enumerate(kept) if stays]
    group.seats = [group.seats[row] for row in numbers]
    if group.seats:
        group.rows = group.rows.rows(numbers)
