"""Sixty inputs of the 300 of `python -m tests.fuzz`, and what it tells apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import worker
from tests.fuzz.damage import damaged
from tests.fuzz.worker import MOST_BYTES, SECONDS

ROOT = Path(__file__).parents[2]
KINDS = {"images", "shards", "rows", "recipes", "checkpoints"}
pytestmark = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")

TELLS_APART = """
import os, sys, time
from pathlib import Path
from tests.fuzz import worker
from tests.fuzz.worker import outcome_of

worker.SECONDS, worker.MOST_BYTES = 1, 200_000_000

def raises(): raise KeyError("x")
def refuses(): print("error: one sentence", file=sys.stderr); return 2
def talks(): print("error: one\\nerror: two", file=sys.stderr); return 2
def exits(): raise SystemExit(2)
def spins():
    while True: pass
def waits(): time.sleep(99)
def grows(): bytearray(os.urandom(1)) * 400_000_000; return 0
def dies(): os.kill(os.getpid(), 11)
def fails(): return 3

for work in (lambda: 0, refuses, exits, talks, raises, spins, waits, grows, dies, fails):
    print(outcome_of(work, Path(sys.argv[1])).how)
"""


@pytest.mark.timeout(600)
def test_sixty_inputs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--count", "60"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    *kinds, last = map(json.loads, done.stdout.splitlines())
    assert last == {"bad": []}
    assert {one["kind"] for one in kinds} == KINDS
    for one in kinds:
        assert one.get("done", 0) + one.get("refused", 0) == 60 // len(KINDS), one
        assert 0 < one["most_seconds"] <= SECONDS
        assert 0 < one["most_mb"] * 10**6 <= MOST_BYTES
    assert sum(one.get("done", 0) for one in kinds) >= 10  # some are good, or nothing is tried


def test_ends_are_told_apart(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TELLS_APART, str(tmp_path / "log")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = ["done", "refused", "refused", "wordy", "traceback", "hang", "hang", "memory"]
    assert done.stdout.split() == [*expected, "died", "died"]


def test_limits() -> None:
    assert (SECONDS, MOST_BYTES) == (20, 1_500_000_000)
    assert {how for how in ("done", "refused") if how in worker.FINE} == set(worker.FINE)


def test_damage_follows_from_the_seed() -> None:
    data = bytes(range(256)) * 9
    made = [damaged(data, Random(seed)) for seed in range(40)]
    assert made == [damaged(data, Random(seed)) for seed in range(40)]
    assert len(set(made)) > 35
    assert sum(one != data for one in made) == 40
