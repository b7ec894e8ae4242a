"""What a job read, wrote, changed and left out, by reason, with the first names of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from data_pipelines.shards.sample_stats import check_share

NAMED = 5  # names that are kept of each reason
REASONS = ("changed", "left_out")
LONGEST_REASON = 500  # characters that are kept of one
MOST_REASONS = 50  # that are told apart
# What tells two cases of one reason apart: quoted texts, numbers, and what stands in brackets.
_PARTICULARS = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\([^()]*\)|\S*\d\S*")


@dataclass
class Cases:
    """How often a reason came up, in the words of its first case, and where first."""

    reason: str
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, count: int, names: list[str]) -> None:
        """Count more of them."""
        self.count += count
        self.first += names[: NAMED - len(self.first)]

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        return f"{self.count}: {self.reason} ({', '.join(self.first)}{more})"


@dataclass
class Report:
    """Counts of one job; its index records them.

    Attributes:
        max_broken: Share of broken samples above which `add_broken` raises ValueError with the
            list.
        before: Counts of the same job that the share is judged with.
        broken: Of those that were left out, how many were damaged.
        unused: Columns of rows that have no place in a sample, and how many rows had them.
    """

    max_broken: float = 1.0
    before: Report | None = None
    read: int = 0
    written: int = 0
    broken: int = 0
    changed: list[Cases] = field(default_factory=list)
    left_out: list[Cases] = field(default_factory=list)
    unused: dict[str, int] = field(default_factory=dict)

    def add_broken(self, name: str, reason: str) -> None:
        """Count a sample that is damaged; ValueError where there are too many of them."""
        self.broken += 1
        self.leave_out(name, reason)
        both = self if self.before is None else self.before + self
        listed = "; ".join(map(str, both.left_out))
        check_share(both.broken, both.read, self.max_broken, listed)

    def leave_out(self, name: str, reason: str) -> None:
        """Count a sample that is left out although nothing is broken."""
        _add(self.left_out, Cases(reason[:LONGEST_REASON]), 1, [name])

    def change(self, name: str, reason: str) -> None:
        """Count a sample that is written otherwise than it was read."""
        _add(self.changed, Cases(reason[:LONGEST_REASON]), 1, [name])

    def __add__(self, other: Report) -> Report:
        total = Report(
            self.max_broken,
            None,
            self.read + other.read,
            self.written + other.written,
            self.broken + other.broken,
        )
        for report in (self, other):
            for mine, theirs in (
                (total.changed, report.changed),
                (total.left_out, report.left_out),
            ):
                for cases in theirs:
                    _add(mine, Cases(cases.reason), cases.count, cases.first)
            for name, count in report.unused.items():
                total.unused[name] = total.unused.get(name, 0) + count
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, as an index holds them."""
        counts = asdict(self)
        del counts["max_broken"], counts["before"]
        return counts

    @classmethod
    def from_dict(cls, counts: Mapping[str, Any]) -> Report:
        """Return the report that `to_dict` wrote; ValueError where it is damaged."""
        try:
            changed, left_out = ([Cases(**one) for one in counts[name]] for name in REASONS)
            return cls(**{**counts, "changed": changed, "left_out": left_out})
        except (KeyError, TypeError) as error:
            raise ValueError(f"its counts are damaged ({error!r}); delete it") from None

    def __str__(self) -> str:
        """One line of counts, then one for each reason."""
        changed = sum(cases.count for cases in self.changed)
        left_out = sum(cases.count for cases in self.left_out)
        lines = [
            f"{self.read} read, {self.written} written, {changed} changed, {left_out} left out"
        ]
        lines += [f"  changed {cases}" for cases in self.changed]
        lines += [f"  left out {cases}" for cases in self.left_out]
        if self.unused:
            listed = ", ".join(f"{name} ({count})" for name, count in sorted(self.unused.items()))
            lines.append(f"  not used, columns and the rows that have them: {listed}")
        return "\n".join(lines)


def _add(all_cases: list[Cases], new: Cases, count: int, names: list[str]) -> None:
    kind = _PARTICULARS.sub("#", new.reason)
    same = (one for one in all_cases if _PARTICULARS.sub("#", one.reason) == kind)
    found = next(same, None)
    if found is None and len(all_cases) > MOST_REASONS:
        found = all_cases[-1]
        found.reason = "other reasons"
    if found is None:
        all_cases.append(found := new)
    found.add(count, names)
