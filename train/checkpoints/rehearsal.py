"""What a run needs later, tried before its first step: a sample sheet, a checkpoint, the way back.

What would fail after an hour fails in the first seconds. The run itself is left as it was: its
random numbers, weights and data.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from mmdlm import load
from mmdlm.models.checkpoints.run_steps import SETUP, SHARDED, Base, open_checkpoint
from train.checkpoints.checkpoint import written_folder
from train.checkpoints.run_state import RunState, unmoved_generators

FOLDER = ".rehearsal"  # of a run, while it lasts
STEP = "step_00000000"
LARGEST = 1 << 31  # bytes of weights that are loaded as a user loads them, at most

# Runs a check on the main process, and raises its ValueError on all.
OnMain = Callable[[Callable[[], None]], None]


def rehearse(
    state: RunState,
    out: Path,
    *,
    on_main: OnMain,
    sheet: Callable[[], None] | None = None,
    setup: Callable[[Path], None] | None = None,
) -> None:
    """Draw a sheet, write a checkpoint, go on from it and load it as a model; then remove it.

    Every process calls it, before the first step.

    Args:
        state: State of the run.
        out: Folder of the run.
        on_main: Runs a check on the main process.
        sheet: Draws a sample sheet; None where the run draws none.
        setup: Fills the folder of what the weights of a step are asked with; None where they are
            no model.

    Raises:
        ValueError: Says which of them fails, and why.
        OSError: Where there is no room to write.
    """
    folder = out / FOLDER
    untouched = [optimizer for optimizer in state.optimizers if not optimizer.state]
    with unmoved_generators():
        if sheet is not None:
            with _trying("the sample sheet cannot be drawn"):
                on_main(sheet)
        try:
            _write(state, folder / STEP)
            with _trying("a checkpoint cannot be continued from"):
                state.read(folder / STEP, step=0)
                state.record.check(folder / STEP, finished=False)
            with _trying("a checkpoint cannot be loaded as a model"):
                on_main(lambda: _load(folder, setup))
            state.accelerator.wait_for_everyone()
        finally:
            if state.accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
    for optimizer in untouched:  # torch makes a state for sharded weights, which counts a step
        optimizer.state.clear()


def rehearse_saving(
    save: Callable[[Path], object], load: Callable[[Path], object], out: Path
) -> None:
    """Write what a run will write in the end, and load it; then remove it.

    Args:
        save: Writes into a folder.
        load: Loads from it.
        out: Folder of the run; a folder in it is written and removed.

    Raises:
        ValueError: Where it cannot be loaded.
        OSError: Where there is no room to write.
    """
    folder = out / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        with unmoved_generators(), _trying("what will be saved cannot be loaded"):
            save(folder)
            load(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(state: RunState, folder: Path) -> None:
    accelerator = state.accelerator
    if accelerator.is_main_process:
        shutil.rmtree(folder.parent, ignore_errors=True)  # of a run that was killed
    complete = written_folder(
        folder,
        state.write,
        is_main=accelerator.is_main_process,
        wait=accelerator.wait_for_everyone,
    )
    if complete is not None:
        complete()
    accelerator.wait_for_everyone()  # the main process gives it its name


def _load(folder: Path, setup: Callable[[Path], None] | None) -> None:
    """Load the checkpoint as users load a step; ValueError where that fails.

    It is not tried where it would take long, nor where a user has to bring what the run does
    without: frozen weights that lie in no folder, an image tokenizer.
    """
    if setup is None or (folder / STEP / SHARDED).is_dir():
        return
    (folder / SETUP).mkdir()
    setup(folder / SETUP)
    base = Base.read(folder / SETUP)
    if base is not None and base.lacks:
        return
    checkpoint = open_checkpoint(folder / STEP)
    if sum(tensor.nbytes for tensor in checkpoint.tensors.values()) > LARGEST:
        return
    vocabulary = checkpoint.config.get("vocabulary") or {}
    first, last = vocabulary.get("image", (0, 0))
    if first < last and not (folder / SETUP / "image_tokenizer").is_dir():
        return
    with redirect_stderr(io.StringIO()):  # it says which step it is
        load(folder / STEP, device="cpu")


@contextmanager
def _trying(what: str) -> Iterator[None]:
    """Say in a ValueError what was tried."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}, as tried before the first step: {error}") from error
