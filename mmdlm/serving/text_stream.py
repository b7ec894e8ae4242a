"""Stream a text as OpenAI's deltas: its finished prefix, which grows from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmdlm.pipeline.text_run import Draft
from mmdlm.serving.replies import WrittenText, written_texts
from mmdlm.serving.service import Work
from mmdlm.serving.tasks import TextCall


@dataclass(frozen=True)
class Delta:
    """What a step adds.

    Attributes:
        text: To be put behind what was sent before.
        canvas: The whole text, with `[MASK]` where it is open.
        step: 1, 2, ...
        total: Denoising steps.
        written: The whole text, in the last delta.
    """

    text: str
    canvas: str
    step: int
    total: int
    written: WrittenText | None = None

    @property
    def extension(self) -> dict[str, Any]:
        """What is beside OpenAI's fields."""
        return {"step": self.step, "total": self.total, "canvas": self.canvas}


def deltas(call: TextCall, work: Work) -> Iterator[Delta]:
    """Write one text; yield what each step adds to its finished prefix.

    Held back until the end are half characters, what may become one of the stops, and the whole
    text where the sampler may take tokens back.
    """
    if call.task == "caption":
        (text,) = call.texts(work)
        (one,) = written_texts(call, [text], work)
        yield Delta(text, text, 1, 1, one)
        return
    stops = call.options.get("stop") or ()
    longest = max(map(len, [stops] if isinstance(stops, str) else stops), default=1) - 1
    defaults = work.model.defaults
    takes_back = {"chat": defaults.answer, "complete": defaults.complete}.get(
        call.task, defaults.infill
    ).remask > 0
    sent, latest = "", None
    for latest in call.drafts(work):
        stable = _stable(latest, call, longest)
        if takes_back or not stable.startswith(sent):
            stable = sent
        yield Delta(stable[len(sent) :], latest.text, latest.step, latest.total)
        sent = stable
    assert latest is not None
    text = call.written(latest.text)
    (one,) = written_texts(call, [text], work)
    rest = text[len(sent) :] if text.startswith(sent) else ""
    yield Delta(rest, latest.text, latest.step, latest.total, one)


def _stable(draft: Draft, call: TextCall, longest: int) -> str:
    """Return the part of a draft that stays as it is."""
    prefix = draft.prefix
    if draft.committed < draft.tokens:
        prefix = prefix.rstrip("\N{REPLACEMENT CHARACTER}")
        prefix = prefix[: len(prefix) - longest] if longest else prefix
        prefix = prefix.rstrip()  # the end of a text is stripped
    if call.task == "chat":
        prefix = prefix.lstrip()
    if call.before and not prefix.startswith(call.before):
        return ""
    return call.written(prefix)
