"""Hold one prepared run that writes texts: its results, and its drafts step by step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from mmdlm.core.sampling.output import SampleStep
from mmdlm.pipeline.generation_run import GenerationRun

OPEN = chr(0xF0000)  # stands for an open token; in Unicode's private use plane, no text has it
HOLES = re.compile(f"{OPEN}+")


@dataclass(frozen=True)
class Draft:
    """A text as it stands after one denoising step.

    Attributes:
        text: With `[MASK]` for a token that is still open, `[MASK:3]` for three, as `infill` reads
            it; the last draft is the result.
        prefix: The text up to the first open token.
        committed: Tokens that are committed.
        tokens: All tokens that the run writes.
        step: 1, 2, ...
        total: Denoising steps; a text that is finished before needs fewer.
    """

    text: str
    prefix: str
    committed: int
    tokens: int
    step: int
    total: int


@dataclass(frozen=True)
class TextRun:
    """One prepared run of texts.

    Attributes:
        run: One row for each text.
        decode: From the number of a row and its ids [T], or the first of them, to its text.
        show: The same of ids of which some are open, which are mask tokens: see `with_masks`.
        finish: Of each text, at the end: strip it, or leave it.
        stop: A text ends before the first of these.
    """

    run: GenerationRun
    decode: Callable[[int, Tensor], str]
    show: Callable[[int, Tensor], str]
    finish: Callable[[str], str] = str
    stop: tuple[str, ...] = ()

    def texts(self) -> list[str]:
        """Write all texts."""
        if not self.stop:
            ids = self.run.results(self.run.run())
            return [self._cut(self.decode(number, row.cpu())) for number, row in enumerate(ids)]
        for state in self.run.trajectory():
            stopped = [self._stopped(number, row) for number, row in enumerate(self._ids(state))]
            if None not in stopped:
                break  # what is still open stands behind the end of its text
        ids = self.run.results(state.ids)
        return [
            self._cut(self.decode(number, row.cpu()) if text is None else text)
            for number, (row, text) in enumerate(zip(ids, stopped, strict=True))
        ]

    def drafts(self) -> Iterator[Draft]:
        """Write the text of the only row; yield it after each step."""
        for state in self.run.trajectory():
            (row,) = self._ids(state)
            target = self.run.batch.target
            stopped = self._stopped(0, row) if self.stop else None
            text = self._cut(self.show(0, row) if stopped is None else stopped)
            yield Draft(
                text=HOLES.sub(_hole, text),
                prefix=text.partition(OPEN)[0],
                committed=int((state.committed & target).sum()),
                tokens=int(target.sum()),
                step=state.step + 1,
                total=state.steps,
            )
            if stopped is not None:
                return

    def _ids(self, state: SampleStep) -> list[Tensor]:
        """Return the ids of each result on the CPU, mask tokens where they are open."""
        is_open = self.run.batch.target & ~state.committed
        ids = state.ids.masked_fill(is_open, self.run.denoiser.vocabulary.mask_id)
        return [row.cpu() for row in self.run.results(ids)]

    def _prefix(self, ids: Tensor) -> Tensor:
        masks = (ids == self.run.denoiser.vocabulary.mask_id).nonzero()
        return ids[: int(masks[0])] if len(masks) else ids

    def _stopped(self, number: int, ids: Tensor) -> str | None:
        """Return a text up to its first open token if it ends there; None: it goes on."""
        prefix = self._prefix(ids)
        ends = torch.tensor(self.run.sampler.stop_ids, dtype=ids.dtype)
        text = self.decode(number, prefix)
        is_over = len(prefix) == len(ids) or bool(torch.isin(prefix, ends).any())
        return text if is_over or any(one in text for one in self.stop) else None

    def _cut(self, text: str) -> str:
        """End a text before the first of the stops."""
        ends = [place for place in (text.find(one) for one in self.stop) if place >= 0]
        return self.finish(text[: min(ends)] if ends else text)


def _hole(match: re.Match[str]) -> str:
    """Write open tokens as `infill` reads them."""
    count = len(match[0])
    return "[MASK]" if count == 1 else f"[MASK:{count}]"


def with_masks(
    ids: Tensor,
    *,
    mask_id: int,
    first: Callable[[Tensor], str],
    later: Callable[[Tensor], str],
) -> str:
    """Decode ids of which some are still open.

    Args:
        ids: [T], mask tokens where they are open.
        mask_id: The mask token.
        first: Decodes ids with which the text begins.
        later: Decodes ids that follow others.

    Returns:
        The text, with `OPEN` in the place of each open token.
    """
    text, start = "", 0
    for is_open, group in groupby((ids == mask_id).tolist()):
        count = len(list(group))
        some = ids[start : start + count]
        if is_open:
            text += OPEN * count
        else:
            text += first(some) if start == 0 else later(some)
        start += count
    return text


def stops_of(stop: object) -> tuple[str, ...]:
    """Return the stops that a caller gave: one text, several, or None.

    Args:
        stop: What was given.

    Returns:
        All of them.

    Raises:
        ValueError: For an empty one, which would end every text before it begins.
    """
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(one, str) for one in stops):
        raise ValueError(f"stop must be a text or a list of texts, got {stop!r}")
    if "" in stops:
        raise ValueError(f"stop {stop!r} has an empty text, which ends every text; leave it out")
    return tuple(stops)
