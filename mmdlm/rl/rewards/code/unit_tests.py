"""A reward for code that passes its tests, which are run in a sandbox."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from mmdlm.rl.reward import RewardUnavailable, text_of
from mmdlm.rl.rewards.code.sandbox import Outcome, Sandbox
from mmdlm.tasks.code_problems import code_of, separate_tests


@dataclass(frozen=True)
class CodeTests:
    """How many of the column `tests` the code of a completion passes, in a sandbox.

    `tests` is one text with a `check(candidate)` (HumanEval), one of `def test_...` functions
    (KodCode), any other text, or a list of texts (MBPP's asserts): each is one test. They run in
    another process than the code, and compare plain values there (see `sandbox`).

    Columns that are looked at where the data set has them: `entry_point`, the function that
    `check` is called with, and `setup`, which runs before the code. Code that is stopped - an
    endless loop, too much memory, a process, the network, a file elsewhere - gets 0. Why a
    completion did not pass is logged as the column `code/reason`. A row without tests is None.

    Attributes:
        score: "all": 1 if all tests pass, else 0; "share": the share of them that does.
        workers: Runs at a time.
        sandbox: What the code may use.
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
