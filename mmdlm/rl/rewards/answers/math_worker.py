"""The other end of `math_equivalence`: a process that compares answers, one JSON line each.

Run by path, never imported. It is its own process so that an answer such as 9^{9^{9^9}}, which no
signal interrupts, can be killed, and so that one which takes all memory takes only its own.
"""

import json
import logging
import os
import resource
import signal
import sys
from typing import Any


def main() -> None:
    """Read [reference, answer] lines, write {"equal": ..} or {"error": ..} lines."""
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify  # type: ignore[import-untyped]

    print(json.dumps({"ready": True}), file=answers, flush=True)
    result: dict[str, Any]
    for line in sys.stdin:
        reference, answer, seconds = json.loads(line)
        # Of processor time, so that a score does not hang on what else the machine does. Nobody
        # handles the signal: it ends the process, whatever library is at work.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            # without their timeouts, which are signals: whoever waits for this keeps the time
            right = parse(f"${reference}$", parsing_timeout=0)
            given = parse(f"${answer}$", parsing_timeout=0)
            result = {"equal": bool(verify(right, given, timeout_seconds=0))}
        except Exception as error:  # a parser of free text may raise anything
            result = {"equal": False, "error": type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
