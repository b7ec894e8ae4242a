"""A reward for code that passes its tests, which are run in a sandbox."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from mmdlm.rl.reward import RewardUnavailable, text_of
from mmdlm.rl.rewards.answers.answer import tagged
from mmdlm.rl.rewards.code.sandbox import Outcome, Sandbox

LONGEST = 4000  # characters of a text without fences that is tried as code
DEFINITION = re.compile(r"^(?:async\s+def|def|class)\s", re.MULTILINE)
FENCE = re.compile(
    r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)
PYTHON = ("", "python", "py", "python3")


def code_of(completion: str, *, entry_point: str | None = None) -> str | None:
    """Return the Python in a completion.

    Of its fenced blocks it is the last that defines `entry_point`, or else defines anything at all,
    or else the last; without fences all of it, if it compiles.

    An `<answer>` is looked into first. A fence that is never closed reaches to the end.
    """
    inside = tagged(completion)
    for text in (completion,) if inside is None else (inside, completion):
        blocks = [code for kind, code in FENCE.findall(text) if kind.lower() in PYTHON]
        if entry_point is not None:
            defining = [code for code in blocks if defines(code, entry_point)]
            blocks = defining or blocks
        if blocks:  # a block that shows what the code prints defines nothing
            return next((one for one in reversed(blocks) if DEFINITION.search(one)), blocks[-1])
        if "```" not in text and _compiles(text):
            return text
    return None


def defines(code: str, name: str) -> bool:
    """Return whether a function or class of this name stands at the left edge."""
    pattern = rf"^(?:async\s+def|def|class)\s+{re.escape(name)}\b"
    return re.search(pattern, code, flags=re.MULTILINE) is not None


def _compiles(text: str) -> bool:
    if len(text) > LONGEST:  # Python's parser may take very long over what a model has repeated
        return False
    try:
        compile(text, "<completion>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(text.strip())


@dataclass(frozen=True)
class CodeTests:
    """How many of the column `tests` the code of a completion passes, in a sandbox.

    tests     one text with a `check(candidate)` (HumanEval), one of `def test_...` functions
              (KodCode), any other text, or a list of texts (MBPP's asserts): each is one test
    score     "all": 1 if all tests pass, else 0; "share": the share of them that does
    workers   runs at a time
    sandbox   what the code may use

    The tests run in another process than the code, and compare plain values there (see `sandbox`).

    Columns that are looked at where the data set has them: `entry_point`, the function that
    `check` is called with, and `setup`, which runs before the code. Code that is stopped - an
    endless loop, too much memory, a process, the network, a file elsewhere - gets 0. Why a
    completion did not pass is logged as the column `code/reason`. A row without tests is None.
    """

    score: Literal["all", "share"] = "all"
    workers: int = 2
    sandbox: Sandbox = Sandbox()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        tests: Sequence[str | Sequence[str]],
        entry_point: Sequence[str | None] | None = None,
        setup: Sequence[str | None] | None = None,
        log_extra: Callable[[str, list[str]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """[N] scores."""
        none: list[str | None] = [None] * len(completions)
        rows = zip(completions, tests, entry_point or none, setup or none, strict=True)
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(lambda row: self.run(text_of(row[0]), *row[1:]), rows))
        if log_extra is not None:
            log_extra("code/reason", [one.reason for one in found])
        if self.score == "share":
            return [one.share if one.passed else None for one in found]
        return [float(all(one.passed)) if one.passed else None for one in found]

    def prepare(self) -> None:
        """Try the sandbox; see `Rubric.prepare`. Later a failure to start is counted as a skip."""
        try:
            self.sandbox.run("", ["pass"])
        except RuntimeError as error:
            raise RewardUnavailable(str(error)) from error

    def run(
        self,
        completion: str,
        tests: str | Sequence[str],
        entry_point: str | None = None,
        setup: str | None = None,
    ) -> Outcome:
        """Return what became of one completion."""
        try:
            each = separate_tests(tests, entry_point)
        except ValueError as error:  # only of this row
            return Outcome((), str(error), ())
        code = code_of(completion, entry_point=entry_point)
        if code is None:
            return Outcome((False,) * len(each), "there is no code in it", ())
        return self.sandbox.run(code, each, setup=setup or "")


def _taken(entry_point: str) -> str:
    """Return the import of the tested code, whose name may be one of Python's, too."""
    return f"from solution import {entry_point}\n" if entry_point.isidentifier() else ""


def separate_tests(tests: str | Sequence[str], entry_point: str | None = None) -> list[str]:
    """Turn the tests of a data set into texts that each pass or raise.

    Raises ValueError where there are none, or where `check` has nothing to be called with.
    """
    if not isinstance(tests, str):
        each = [one for one in tests if one.strip()]
    elif defines(tests, "check"):
        if not entry_point:
            raise ValueError("the tests define check(candidate) but there is no entry_point")
        each = [f"{tests}\n\n{_taken(entry_point)}check({entry_point})\n"]
    else:
        names = re.findall(r"^def (test\w*)\(\s*\)", tests, flags=re.MULTILINE)
        each = [f"{tests}\n\n{name}()\n" for name in names] or [tests] * bool(tests.strip())
    if not each:
        raise ValueError("there are no tests; give code something to pass")
    return each
