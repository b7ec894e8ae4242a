"""Run code that nobody has read, and tests on it, in processes of their own that can do little.

What stands between the code and the machine, from the outside in:

parent      own session and folder, killed with all its children when time is up
limits      of processor time, memory, file size and open files (setrlimit); no capabilities
landlock    Linux 5.13: writing and making files only in the folder, reading only Python's own
            files; from 6.7 no TCP, from 6.12 no signals to others
seccomp     Linux: no sockets, no new processes or programs, no tracing, no signals to others
audit       Python's audit hook: the same, with the name of what was tried; also on macOS

Each is used where the system has it, without any privilege. With only the audit hook (macOS),
what stops code is Python and not the kernel: it holds against what a model writes by itself, not
against someone who studies it.

What stands between the code and its tests: they run in another process, which sends calls and gets
plain values, or handles that equal no plain value (see `remote`). Source of the threats:
arXiv:2107.03374, section 2.3. SECURITY.md says what is left.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdlm.rl.reward import RewardUnavailable

WORKER = Path(__file__).with_name("sandbox_worker.py")
LAYERS = ("limits", "landlock", "seccomp", "audit")
STARTING = 60.0  # seconds that starting Python may take on a busy machine
REPORT = 1 << 20  # bytes of it that are read
PATIENCE = 10  # seconds on the clock for one of processor time
GLANCE = 0.05  # seconds between two looks at the processor time


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        passed: For each test; all false where the code was stopped.
        reason: Why not all passed, in one sentence; "" where they did.
        layers: The guards that were in force.
    """

    passed: tuple[bool, ...]
    reason: str
    layers: tuple[str, ...]

    @property
    def share(self) -> float:
        """Of the tests that passed."""
        return sum(self.passed) / len(self.passed) if self.passed else 0.0


@dataclass(frozen=True)
class Sandbox:
    """Where code is run, and what it may use.

    Attributes:
        seconds: Of processor time, from the first line of the code to the end of the last test; the
            same result is then found on a busy machine. On the clock it is `PATIENCE` times that.
        megabytes: Of memory (address space), for the code and for its tests each.
        file_megabytes: A file that it writes may have.
        layers: Guards to use, where the system has them.
        required: Guards without which nothing is run.
    """

    seconds: float = 5.0
    megabytes: int = 1024
    file_megabytes: int = 8
    layers: tuple[str, ...] = LAYERS
    required: tuple[str, ...] = ("limits", "audit")

    def __post_init__(self) -> None:
        for name in ("layers", "required"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # YAML has lists
            unknown = sorted(set(getattr(self, name)) - set(LAYERS))
            if unknown:
                raise ValueError(f"{name} {unknown[0]!r} is none of {', '.join(LAYERS)}")
        for name in ("seconds", "megabytes", "file_megabytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")

    def run(self, code: str, tests: Sequence[str], *, setup: str = "") -> Outcome:
        """Run `setup` and `code` as the module `solution`, and each test in another process.

        Tests have the names of `setup` and, unless Python has the same, those of `solution`. A test
        passes that raises nothing. Code that is stopped - late, too large, or caught at what it may
        not do - passes none, whatever it passed before.
        """
        none = (False,) * len(tests)
        folder = tempfile.mkdtemp(prefix="solution-")
        order = {
            "setup": setup,
            "code": code,
            "folder": os.path.realpath(folder),
            "layers": self.layers,
            "seconds": self.seconds,
            "bytes": self.megabytes << 20,
            "file_bytes": self.file_megabytes << 20,
        }
        try:
            said, end = self._run(order, {"tests": list(tests)}, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        ready = next((line for line in said if "layers" in line), None)
        if ready is None:
            raise RuntimeError(f"the sandbox does not start here ({end or 'it ended early'})")
        layers = tuple(ready["layers"])
        missing = [one for one in self.required if one not in layers]
        if missing:
            raise RewardUnavailable(
                f"the sandbox has no {missing[0]!r} here; take it out of `required` if "
                f"{', '.join(layers)} are enough"
            )
        if not end:
            end = next((line["stopped"] for line in said if "stopped" in line), "")
        lost = next((line for line in said if "lost" in line), None)
        if lost is not None and not end:
            code_ended = os.waitstatus_to_exitcode(lost["ended"])
            end = self._why(code_ended) if code_ended else ""
            end = lost["lost"] if lost["lost"] != ENDED else end
        if end:
            return Outcome(none, end, layers)
        results = {line["test"]: line["reason"] for line in said if "test" in line}
        reasons = [results.get(n, ENDED) for n in range(len(tests))]
        if not tests:
            broken = next((line["code"] for line in said if line.get("code")), "")
            return Outcome((), broken, layers)
        reason = next((one for one in reasons if one), "")
        return Outcome(tuple(not one for one in reasons), reason, layers)

    def _run(
        self, order: dict[str, Any], tests: dict[str, Any], folder: str
    ) -> tuple[list[dict[str, Any]], str]:
        """Return the lines that the test process wrote, and why it was ended, or ""."""
        reading, writing = os.pipe()
        with tempfile.TemporaryFile() as for_code, tempfile.TemporaryFile() as for_tests:
            for file, content in ((for_code, order), (for_tests, tests)):
                file.write(json.dumps(content).encode())
                file.seek(0)
            files = (for_code.fileno(), for_tests.fileno(), writing)
            # -I: nothing of this process's environment; -B: nothing is written beside modules
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(WORKER), *map(str, files)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=files,
                start_new_session=True,
                cwd=folder,
                env={"HOME": folder, "TMPDIR": folder, **ONE_THREAD},
            )
        os.close(writing)
        try:
            report, late = self._read(reading, process.pid)
        finally:
            os.close(reading)
            with suppress(ProcessLookupError, PermissionError):  # macOS: of zombies
                os.killpg(process.pid, signal.SIGKILL)  # whatever it left behind, itself included
            process.wait()
        lines = [json.loads(line) for line in report.split(b"\n") if _is_json(line)]
        if late:
            return lines, late
        return lines, "" if process.returncode == 0 and lines else self._why(process.returncode)

    def _read(self, pipe: int, pid: int) -> tuple[bytes, str]:
        """Return the report up to its end, and why it was cut short, or ""."""
        report = b""
        began: dict[int, float] | None = None  # process -> its time when the code began
        until = time.monotonic() + STARTING
        while True:
            left = until - time.monotonic()
            if left <= 0:
                if began is None:
                    return report, ""
                return report, f"it ran for more than {PATIENCE * self.seconds:g} seconds"
            if began is not None:
                used = sum(_processor_time(one) - time_then for one, time_then in began.items())
                if used > self.seconds:
                    return report, self._why(-signal.SIGXCPU)
            if not select.select([pipe], [], [], left if began is None else min(left, GLANCE))[0]:
                continue
            part = os.read(pipe, 1 << 16)
            report += part
            if not part:
                return report, ""
            if len(report) > REPORT:
                return report, "its tests wrote too much into the report of the sandbox"
            if began is None and b"\n" in report:  # it is ready: from now on time counts
                ready = json.loads(report.split(b"\n", 1)[0])
                began = {one: _processor_time(one) for one in (pid, ready["worker"])}
                until = time.monotonic() + PATIENCE * self.seconds

    def _why(self, code: int) -> str:
        if code == -signal.SIGXCPU:
            return f"it took more than {self.seconds:g} seconds of processor time"
        if code == -signal.SIGXFSZ:
            return f"it wrote a file of more than {self.file_megabytes} MB"
        if code == -signal.SIGSYS:
            return "it made a system call that is forbidden: a socket, a process or a signal"
        if code == -signal.SIGKILL:
            return "it was killed: for want of memory, or because it hid from the sandbox"
        if code < 0:
            return f"it died of {signal.Signals(-code).name}"
        return f"it ended with status {code}"


ENDED = "the code ended itself"  # as `remote` says it
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _processor_time(process: int) -> float:
    """Seconds that a process has run on a processor; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0.0  # RLIMIT_CPU, in whole seconds, is what there is
    try:
        return time.clock_gettime(~process << 3 | 2)  # MAKE_PROCESS_CPUCLOCK(process, SCHED)
    except OSError:
        return 0.0
