"""What of a source was good and what was broken, and when a run stops for it."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

log = logging.getLogger(__name__)
State = dict[str, Any]  # what JSON can hold
JUDGED_AFTER = 100  # samples before the share of broken ones says anything
LISTED = 50  # broken samples whose names are kept


@dataclass(frozen=True)
class BrokenSample:
    """A sample, or (without key) the rest of a shard, that cannot be used."""

    url: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        place = f"sample {self.key}" if self.key else "rest of the shard"
        return f"{self.url}, {place}: {self.reason}"


@dataclass
class SampleStats:
    """Counts what was usable and what was not; stops the run when too much was not.

    Attributes:
        max_share: Share of broken samples above which `add_broken` raises ValueError with the list;
            the first `JUDGED_AFTER` samples may hold as many as a full hundred may.
    """

    max_share: float
    good: int = 0
    broken: int = 0
    listed: list[BrokenSample] = field(default_factory=list)

    def add_broken(self, broken: BrokenSample) -> None:
        self.broken += 1
        if broken not in self.listed and len(self.listed) < LISTED:
            self.listed.append(broken)
            log.warning("skipped %s", broken)
        check_share(self.broken, self.good + self.broken, self.max_share, self.summary())

    def summary(self) -> str:
        """Return the broken samples that are listed, as text."""
        more = "; and others" if self.broken > len(self.listed) else ""
        return "; ".join(map(str, self.listed)) + more

    def state_dict(self) -> State:
        return {
            "good": self.good,
            "broken": self.broken,
            "listed": [asdict(one) for one in self.listed],
        }

    def load_state_dict(self, state: State) -> None:
        self.good, self.broken = state["good"], state["broken"]
        self.listed = [BrokenSample(**one) for one in state["listed"]]


def check_share(broken: int, seen: int, max_share: float, listed: str) -> None:
    """Raise ValueError, with the list, where more than a share of all samples is broken.

    The first `JUDGED_AFTER` samples may hold as many as a full hundred may.
    """
    if broken > max_share * max(seen, JUDGED_AFTER):
        raise ValueError(
            f"{broken} of {seen} samples are broken, more than the allowed share {max_share}; "
            f"repair them or raise max_broken: {listed}"
        )


def one_line(error: BaseException) -> str:
    """Return the message of an exception without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
