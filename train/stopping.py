"""Signals that end a run after its step, agreed on by all processes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator

# That end a run after its step; SIGHUP, where there is one, is that of a terminal that closes.
SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Stopped(SystemExit):
    """A run that a signal ended; its status is the one that a shell gives to the signal."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        super().__init__(f"stopped at step {step}; the same command continues from there")
        self.code = 128 + number


def end_early(done: int, asked: Sequence[bool], accelerator: Accelerator) -> Stopped:
    """End the training after a step, and return what says so."""
    accelerator.end_training()
    number = next(each for each, held in zip(SIGNALS, asked, strict=True) if held)
    stopped = Stopped(done, number)
    accelerator.print(stopped, file=sys.stderr)
    return stopped


class _Stop:
    """The signal that asked for a stop, if one did."""

    number: int | None = None

    def asked(self) -> tuple[bool, ...]:
        return tuple(number == self.number for number in SIGNALS)


def agreed(asked: tuple[bool, ...], accelerator: Accelerator) -> tuple[bool, ...]:
    """Whether each holds on any process: a signal or a clock reaches them at different steps."""
    if accelerator.num_processes == 1:
        return asked
    numbers = torch.tensor(asked, dtype=torch.int64, device=accelerator.device)
    return tuple(bool(one) for one in accelerator.reduce(numbers, reduction="sum"))


@contextmanager
def stop_signals() -> Iterator[_Stop]:
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
