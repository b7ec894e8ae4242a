"""One input at a time in a process of its own: how it ended, and what it took."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 20  # of processor time; one that waits may wait for so many times as long
PATIENCE = 6
MOST_BYTES = 1_500_000_000  # of resident memory
TOLD = 2000  # characters of what was printed that are kept
FINE = ("done", "refused")


@dataclass(frozen=True)
class Outcome:
    """How an input ended.

    Attributes:
        how: "done" (status 0), "refused" (status 2 and one sentence), "traceback", "wordy" (status
            2 and several lines), "hang", "memory", or "died" by a signal or with another status.
        seconds: Of processor time.
        bytes: Of resident memory, at its peak.
        said: The end of what was printed.
    """

    how: str
    seconds: float
    bytes: int
    said: str

    @property
    def is_fine(self) -> bool:
        return self.how in FINE


def outcome_of(work: Callable[[], int], log: Path) -> Outcome:
    """Do it in a process that is forked from this one, which must have no threads.

    Args:
        work: Gives the exit status.
        log: File for what it prints.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_child(work, log)
    hangs = False
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() - began > SECONDS * PATIENCE and not hangs:
            hangs = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    said = log.read_text(errors="replace")
    seconds = usage.ru_utime + usage.ru_stime
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    code = os.waitstatus_to_exitcode(status)
    return Outcome(_how(code, said, hangs=hangs, peak=peak), seconds, peak, said[-TOLD:])


def _how(code: int, said: str, *, hangs: bool, peak: int) -> str:
    if hangs or code == -signal.SIGXCPU:
        return "hang"
    if peak > MOST_BYTES:
        return "memory"
    if "Traceback" in said:
        return "traceback"
    if code not in (0, 2):
        return "died"
    errors = [line for line in said.splitlines() if line.startswith(("error: ", "mmdlm: "))]
    if code == 2 and len(errors) > 1:
        return "wordy"
    return "refused" if code == 2 else "done"


def _be_the_child(work: Callable[[], int], log: Path) -> None:
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
