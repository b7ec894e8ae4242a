"""The nearest name: case, typing errors, and names that are like none."""

from __future__ import annotations

import pytest

from mmdlm.pipeline.task_defaults import Defaults
from mmdlm.vision.known_names import nearest, suggestion

KNOWN = ["training.max_steps", "training.seed", "data.batch_size", "out"]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("training.Steps", "training.max_steps"),
        ("TRAINING.MAX_STEPS", "training.max_steps"),
        ("training.max-steps", "training.max_steps"),
        ("training.max_stesp", "training.max_steps"),
        ("data.batchsize", "data.batch_size"),
        ("Out", "out"),
        ("zebra", None),
        ("", None),
    ],
)
def test_it_is_found_or_there_is_none(name: str, expected: str | None) -> None:
    assert nearest(name, KNOWN) == expected
    assert suggestion(name, KNOWN) == (f"; did you mean {expected}?" if expected else "")


def test_case_alone_wins_over_likeness() -> None:
    assert nearest("STEP", ["steps", "step"]) == "step"


def test_decoding_says_it() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'caption.Order'; .*; did you mean order\?"):
        Defaults().updated({"caption": {"Order": "random"}})
