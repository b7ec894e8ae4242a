"""Checkpoints of a running job: complete or absent, never half; the newest few are kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from mmdlm.atomic_files import PART, begin_folder, finish_folder
from mmdlm.models.checkpoints.run_steps import completed

log = logging.getLogger(__name__)
# Fills a folder. It may go on when it has returned: its result waits for that; None: it is done.
Write = Callable[[Path], Callable[[], None] | None]


def latest(folder: Path) -> tuple[Path, int] | None:
    """Return the newest complete checkpoint of a run and its step; None where there is none."""
    found = completed(folder) if folder.is_dir() else []
    if not found:
        return None
    step, path = max(found)
    return path, step


class Checkpoints:
    """Those of one run: each is complete or absent, and the newest `keep` stay.

    Where several processes write one folder, each has an object like this and calls the same of it;
    `is_main` holds for one, and `wait` returns when all have reached it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        is_main: bool = True,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.keep = folder, keep
        self.is_main, self.wait = is_main, wait
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, write: Write) -> None:
        """Write folder/step_N as `replace_folder` does, after the one before is done.

        What `write` goes on with after it has returned is waited for in another thread. Raises
        OSError that says so, and what remains, where the disk is full or not writable; where that
        is heard of too late, the next call says so and writes its own.
        """
        try:
            self.finish()
        except OSError as error:
            log.warning("%s", error)
        final = self.folder / f"step_{step:08d}"
        with self._saying_what_remains():
            complete = written_folder(final, write, is_main=self.is_main, wait=self.wait)
            if complete is None:
                self._drop_old(step)
            else:
                self._writing = self._thread.submit(self._end, complete, step)

    def finish(self) -> None:
        """Return when the last one is on disk, and all processes know."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            with self._saying_what_remains():
                writing.result()
        finally:
            self.wait()

    def _end(self, complete: Callable[[], None], step: int) -> None:
        complete()
        self._drop_old(step)

    def _drop_old(self, step: int) -> None:
        if not self.is_main:
            return
        for step_of, path in sorted(completed(self.folder))[: -self.keep]:
            if step_of != step:
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _saying_what_remains(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            survivor = latest(self.folder)
            kept = f"{survivor[0]} is intact" if survivor else "no earlier checkpoint exists"
            raise OSError(f"{error}; {kept}, and the same command continues the run") from error


def replace_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill an `atomic_folder`; raise OSError that says so where the disk is full."""
    written_folder(final, write)


def written_folder(
    final: Path,
    write: Write,
    *,
    is_main: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> Callable[[], None] | None:
    """`replace_folder` by several processes; what is still to be done, if something is."""
    part = final.with_name(final.name + PART)

    def complete() -> None:
        with _failing_whole(part, final):
            if rest is not None:
                rest()
            if is_main:
                finish_folder(final)

    with _failing_whole(part, final):
        if is_main:
            begin_folder(final)
        wait()
        rest = write(part)
        wait()
    if rest is not None:
        return complete
    complete()
    return None


@contextmanager
def _failing_whole(part: Path, final: Path) -> Iterator[None]:
    """Remove what a failed write left behind, and raise its error as an OSError."""
    try:
        yield
    except Exception as error:
        if not _is_write_failure(error):
            raise
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"cannot write {final}: {error}; free some space") from error


def _is_write_failure(error: Exception) -> bool:
    # torch and safetensors wrap the operating system's error in their own types.
    text = f"{type(error).__name__} {error}"
    return isinstance(error, OSError) or any(
        sign in text
        for sign in ("No space left", "PytorchStreamWriter", "inline_container", "SafetensorError")
    )
