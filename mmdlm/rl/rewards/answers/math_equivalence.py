"""A reward for an answer that is mathematically the right one, however it is written."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmdlm.rl.reward import RewardUnavailable, text_of
from mmdlm.tasks.answers import answer_of, reference_of
from mmdlm.tasks.math_answers import is_doubtful, plain

WORKER = Path(__file__).with_name("math_worker.py")
PATIENCE = 10  # seconds on the clock for one of processor time
STARTING = 120.0  # seconds that importing SymPy may take on a busy machine
LONGEST = 2000  # characters of an answer that is looked at


@dataclass(frozen=True)
class MathEquivalence:
    r"""1 where the answer equals the column `answer`: 0.5, 1/2 and \frac{1}{2} are one.

    The answer is that of `answer.answer_of` (`<answer>`, `\boxed`); the column may be a bare
    answer, a whole solution with a `\boxed`, or a GSM8K solution. What is equal as it is written is
    equal; anything else is compared by `math-verify` (the extra `math`) in a process of its own. An
    answer that is hedged, negated or a false equation is wrong, unless the column is like that.

    How many comparisons ran out of time is logged as `math/timed_out`.

    Attributes:
        seconds: Of processor time that one comparison may take; after it the process ends and the
            score is 0. The same holds after `PATIENCE` times as long on the clock.
        megabytes: Of memory that it may take.

    Source: d1's MATH reward, which is 2.0 of this by string comparison (Hendrycks' normalization).
    """

    seconds: float = 5.0
    megabytes: int = 4096

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        answer: Sequence[str],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """[N] scores."""
        found: list[float | None] = []
        late = 0
        for one, right in zip(completions, answer, strict=True):
            given = answer_of(text_of(one))
            equal = False if given is None else self.equal(reference_of(str(right)), given)
            late += equal is None
            found.append(float(equal is True))
        if log_metric is not None:
            log_metric("math/timed_out", late)
        return found

    def prepare(self) -> None:
        """Start the process; see `Rubric.prepare`."""
        _worker(self.megabytes).equal("1", "1", seconds=STARTING)

    def equal(self, reference: str, answer: str) -> bool | None:
        """Return whether two answers are equal; None where that took too long."""
        if plain(reference) == plain(answer):
            return bool(plain(answer))
        if len(answer) > LONGEST or not answer.strip():
            return False
        if is_doubtful(answer) and not is_doubtful(reference):
            return False
        return _worker(self.megabytes).equal(reference, answer, seconds=self.seconds)


class _Worker:
    """The process; started when it is first needed, and again after it was killed."""

    def __init__(self, megabytes: int) -> None:
        self.megabytes = megabytes
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.buffer = b""
        self.started = False
        atexit.register(self.stop)

    def equal(self, reference: str, answer: str, *, seconds: float) -> bool | None:
        with self.lock:
            process = self.process
            if process is None or process.poll() is not None:
                process = self.start()
            assert process.stdin is not None
            try:
                order = json.dumps([reference, answer, seconds])
                process.stdin.write(order.encode() + b"\n")
                process.stdin.flush()
                line = self.line(process, PATIENCE * seconds)
            except BrokenPipeError:
                line = None
            if line is None:  # late, or dead for want of memory
                self.stop()
                return None
            return bool(json.loads(line).get("equal", False))

    def start(self) -> subprocess.Popen[bytes]:
        if find_spec("math_verify") is None:
            raise RewardUnavailable(
                "the reward MathEquivalence needs the package math-verify; install it with: pip "
                "install 'mmdlm[math]'"
            )
        again = self.started
        self.stop()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(self.megabytes << 20)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self.line(self.process, STARTING) is None:
            self.stop()
            if again:  # it has worked before: to be counted, not to end a run
                raise RuntimeError("math-verify did not start again")
            raise RewardUnavailable(
                "math-verify is installed but does not start here; try: python -c 'import "
                "math_verify'"
            )
        self.started = True
        return self.process

    def line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """Return the next line that the process writes; None where it takes too long."""
        assert process.stdout is not None
        until = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            left = until - time.monotonic()
            ready = left > 0 and select.select([process.stdout], [], [], left)[0]
            part = process.stdout.read1() if ready else b""  # type: ignore[attr-defined]
            if not part:
                return None
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line

    def stop(self) -> None:
        """Kill it, at once; safe to call twice."""
        process, self.process, self.buffer = self.process, None, b""
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


@cache
def _worker_of(process: int, megabytes: int) -> _Worker:
    return _Worker(megabytes)


def _worker(megabytes: int) -> _Worker:
    """One for each limit, kept for the life of this process; a fork of it gets its own."""
    return _worker_of(os.getpid(), megabytes)
