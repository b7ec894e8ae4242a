"""Answers are found in tags and boxes, and references in what data sets give."""

from __future__ import annotations

import pytest

from mmdlm.tasks.answers import answer_of, boxed, reference_of, tagged


@pytest.mark.parametrize(
    "text, found",
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed 7.", "7."),
        (r"\fbox{3}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and \boxed{never closed", "1"),
        ("none", None),
        (r"$\boxed{x}$", "x"),
        (r"\boxed{a\\}", r"a\\"),
        ("\\boxed{" * 5000, None),
    ],
)
def test_boxes(text: str, found: str | None) -> None:
    assert boxed(text) == found


def test_the_last_whole_tags_count() -> None:
    assert tagged("<answer>1</answer> <answer>\n2\n3 </answer> <answer>4") == "2\n3"
    assert tagged("</answer><answer>") is None
    assert answer_of("<answer>so \\boxed{3}</answer>") == "3"
    assert answer_of("\\boxed{9} <answer>3</answer>") == "3"
    assert answer_of("it is 3") is None


def test_references() -> None:
    assert reference_of("48/2 = <<48/2=24>>24\n#### 1,072") == "1,072"
    assert reference_of(r"we get $\boxed{\text{A}}$.") == r"\text{A}"
    assert reference_of(" 5 ") == "5"
