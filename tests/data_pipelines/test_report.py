"""What jobs say at their end: counts by reason, and the first names of each."""

from __future__ import annotations

import json

import pytest

from data_pipelines.jobs.report import Report


def test_reasons_are_told_apart_and_their_particulars_are_not() -> None:
    report = Report(read=9, written=3)
    for number in range(7):
        report.add_broken(f"sample {number}", f"image is cut off ({number} bytes of 'x{number}')")
    report.leave_out("sample 8", "no caption")
    report.change("sample 9", "no text of its own")
    cut, silent = report.left_out
    assert (cut.count, cut.first) == (7, [f"sample {n}" for n in range(5)])
    assert (silent.count, silent.reason) == (1, "no caption")
    said = str(report)
    assert "9 read, 3 written, 1 changed, 8 left out" in said
    assert "left out 7: image is cut off (0 bytes of 'x0') (sample 0, sample 1" in said
    assert "sample 9" in said


def test_counts_add_up_and_are_read_from_an_index() -> None:
    report = Report(read=4, written=3, unused={"tools": 2})
    report.add_broken("a", "cut off")
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == Report.from_dict(report.to_dict())
    both = report + again
    assert (both.read, both.written, both.broken, both.unused) == (8, 6, 2, {"tools": 4})
    (cases,) = both.left_out
    assert (cases.count, cases.first) == (2, ["a", "a"])
    assert report.left_out[0].count == 1


def test_too_many_broken_ones_stop_the_job_and_what_was_before_counts() -> None:
    before = Report(0.02, read=300, written=297)
    for number in range(3):
        before.add_broken(f"{number}", "cut off")
    report = Report(0.02, before=before, read=50)
    for number in range(4):
        report.add_broken(f"late {number}", "cut off")
    with pytest.raises(ValueError, match="8 of 350 samples are broken.*allowed share 0.02.*8: cut"):
        report.add_broken("late 4", "cut off")


def test_many_reasons_do_not_fill_an_index() -> None:
    report = Report()
    for number in range(26**2):
        report.leave_out("x", f"{chr(97 + number // 26)}{chr(97 + number % 26)}")
    assert len(report.left_out) < 60
    assert sum(cases.count for cases in report.left_out) == 26**2
    assert report.left_out[-1].reason == "other reasons"


def test_a_reason_that_is_very_long_is_cut() -> None:
    report = Report()
    report.leave_out("a", "x" * 1_000_000)
    assert len(report.left_out[0].reason) == 500
