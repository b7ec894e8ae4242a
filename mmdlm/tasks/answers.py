"""Where the answer stands in a text: between tags, in a box, or after ####."""

from __future__ import annotations

import re

BOX = re.compile(r"\\f?box(?:ed)?\s*(?=\{)|\\boxed\s+(?=[^\s{])")


def tagged(text: str, tag: str = "answer") -> str | None:
    """Return the content of the last whole `<tag>...</tag>`, stripped.

    A closing tag that is written twice, as models of diffusion do, ends it the first time.
    """
    start = text.rfind(f"<{tag}>", 0, max(text.rfind(f"</{tag}>"), 0))
    if start < 0:
        return None
    return text[start + len(tag) + 2 :].split(f"</{tag}>", 1)[0].strip()


def boxed(text: str) -> str | None:
    r"""Return the content of the last whole `\boxed{...}` or `\fbox{...}`, braces included.

    `\boxed 7` without braces is the word that follows. A box that is never closed is none.
    """
    closed = _closed(text)
    for match in reversed(list(BOX.finditer(text))):
        begin = match.end()
        if text[begin] != "{":
            return re.split(r"[\s$]", text[begin:], maxsplit=1)[0]
        if begin in closed:
            return text[begin + 1 : closed[begin]].strip()
    return None


def _closed(text: str) -> dict[int, int]:
    """Where each brace that opens is closed; one behind a backslash belongs to the text."""
    closed: dict[int, int] = {}
    open_: list[int] = []
    escaped = False
    for n, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            open_.append(n)
        elif character == "}" and open_:
            closed[open_.pop()] = n
    return closed


def after_hashes(text: str) -> str | None:
    """Return what follows the last `####` on its line, where GSM8K keeps its answers."""
    if "####" not in text:
        return None
    return text.rsplit("####", 1)[1].strip().split("\n", 1)[0].strip()


def answer_of(text: str) -> str | None:
    r"""Return a completion's answer: the content of its last `<answer>`, its box first.

    Without tags, the last `\boxed` of all; without either, None.
    """
    inside = tagged(text)
    found = boxed(text if inside is None else inside)
    return inside if found is None else found


def reference_of(text: str) -> str:
    r"""Return a reference answer: its last `\boxed`, what follows `####`, or all of it."""
    found = boxed(text)
    if found is None:
        found = after_hashes(text)
    return text.strip() if found is None else found
