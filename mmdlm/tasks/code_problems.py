"""Code problems: the code in an answer, and tests that each pass or raise."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmdlm.tasks.answers import tagged

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
