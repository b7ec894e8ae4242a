"""One command at a time writes an output; a second one is told which process does, and leaves."""

from __future__ import annotations

import functools
import inspect
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
ATTEMPTS, PAUSE = 5, 0.1  # a process that only looks whether a lock is held, holds it meanwhile


def sole_writer(job: Callable[..., None], *, is_file: bool = False) -> Callable[..., None]:
    """Let a function that has a parameter `out` run only where no other process writes there.

    Args:
        job: The function.
        is_file: Whether `out` is a file; otherwise a folder.

    Returns:
        The function, which holds a lock while it runs.
    """
    parameters = inspect.signature(job)

    @functools.wraps(job)
    def alone(*args: Any, **kwargs: Any) -> None:
        out = Path(parameters.bind(*args, **kwargs).arguments["out"])
        with writing(out, is_file=is_file):
            job(*args, **kwargs)

    return alone


@contextmanager
def writing(out: Path, *, is_file: bool = False) -> Iterator[None]:
    """Within the block no other process enters a block of the same output.

    The operating system holds the lock and lets go of it when the process ends, however it ends.
    Of the processes that one launcher has started the first holds it for all; the others only look
    whether another launcher's does.

    Raises ValueError that names the process which writes there, and for no name of an output.
    """
    if out == Path():
        raise ValueError("out is '', the current folder; name one of its own, such as runs/mine")
    folder = out.parent if is_file else out
    path = folder / (f".{out.name}{LOCK}" if is_file else LOCK)
    if int(os.environ.get("RANK", 0)) > 0:
        if path.exists() and _note(path).get("launch") != _launch():
            _locked(path, out).close()
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = _locked(path, out)
    _sign(file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before others may lock it
        file.close()
        if not is_file and not any(folder.iterdir()):
            folder.rmdir()  # nothing came of it


def _locked(path: Path, out: Path) -> TextIO:
    """Lock the file until it is closed; workers that outlive this process hold nothing."""
    refused = 0
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            refused += 1
            if refused < ATTEMPTS:
                time.sleep(PAUSE)
                continue
            who = _note(path)
            raise ValueError(
                f"{out} is being written by process {who.get('process', '?')} on "
                f"{who.get('host', '?')} ({who.get('command', 'starting')}); wait for it, stop it, "
                "or name another out"
            ) from error
        except OSError as error:
            said = f"warning: {path} cannot be locked ({error}); let nothing else write there"
            print(said, file=sys.stderr)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # of a process that has just ended, and has taken it away


def _sign(file: TextIO) -> None:
    """Say in a lock file who holds it."""
    file.truncate(0)
    note = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "command": " ".join(sys.argv)[:200],
        "launch": _launch(),
    }
    file.write(json.dumps(note) + "\n")
    file.flush()


def _note(path: Path) -> dict[str, Any]:
    """Return what the holder of a lock wrote about itself."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _launch() -> str:
    """Return an id that all processes of one launcher share, and those of no other."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "WORLD_SIZE")
    return " ".join(os.environ.get(name, "") for name in names)
