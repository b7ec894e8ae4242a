"""Try inputs that nobody means: `python -m tests.fuzz --count 300`.

None may end in a traceback, take more than `SECONDS` of processor time or more than `MOST_BYTES` of
memory. Prints how many of each kind ended how, and those that did not end well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import torch

from tests.fuzz.inputs import KINDS, bundled, work_for
from tests.fuzz.worker import Outcome, outcome_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="inputs of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--first", type=int, default=0, help="number of the first of each kind")
    parser.add_argument("--all", action="store_true", help="say of each input how it ended")
    options = parser.parse_args()
    # Threads of a pool do not survive a fork: a child that asks for one of them waits forever.
    torch.set_num_threads(1)
    bundled()
    found: dict[str, list[Outcome]] = {kind: [] for kind in options.kinds}
    bad = []
    for number in range(options.first, options.first + options.count // len(options.kinds)):
        for kind in options.kinds:
            with tempfile.TemporaryDirectory(prefix="fuzz_") as name:
                folder = Path(name)
                chance = Random(f"{options.seed} {kind} {number}")
                work = work_for(kind, chance, folder)
                outcome = outcome_of(work, folder / "log")
            found[kind].append(outcome)
            if options.all:
                print(f"{kind} {number}: {outcome.how}: {' '.join(outcome.said.split())[-300:]}")
            if not outcome.is_fine:
                bad.append(f"{kind} {number}")
                print(f"{kind} {number}: {outcome.how}\n{outcome.said}\n", file=sys.stderr)
    for kind, outcomes in found.items():
        print(
            json.dumps(
                {
                    "kind": kind,
                    **Counter(one.how for one in outcomes),
                    "most_seconds": round(max(one.seconds for one in outcomes), 1),
                    "most_mb": max(one.bytes for one in outcomes) // 10**6,
                }
            )
        )
    print(json.dumps({"bad": bad}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
