"""Where the answer stands in a text: between tags, in a box, after ####, or last of all numbers."""

from __future__ import annotations

import re

BOX = re.compile(r"\\f?box(?:ed)?\s*(?=\{)|\\boxed\s+(?=[^\s{])")
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


def tagged(text: str, tag: str = "answer") -> str | None:
    """What stands in the last whole `<tag>...</tag>`, over any number of lines, stripped."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    if end < 0 or start < 0:
        return None
    return text[start + len(tag) + 2 : end].strip()


def boxed(text: str) -> str | None:
    r"""What stands in the last whole `\boxed{...}` (or `\fbox{...}`), with the braces in it.

    `\boxed 7` without braces is the word that follows. A box that is never closed is none.
    """
    for match in reversed(list(BOX.finditer(text))):
        rest = text[match.end() :]
        if not rest.startswith("{"):
            return re.split(r"[\s$]", rest, maxsplit=1)[0]
        depth = 0
        for n, character in enumerate(rest):
            if n and rest[n - 1] == "\\":  # an escaped brace belongs to the answer
                continue
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return rest[1:n].strip()
    return None


def after_hashes(text: str) -> str | None:
    """What follows the last `####` on its line: where GSM8K keeps its answers."""
    if "####" not in text:
        return None
    return text.rsplit("####", 1)[1].strip().split("\n", 1)[0].strip()


def last_number(text: str) -> str | None:
    """The last number as it is written, but for commas between thousands."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def answer_of(text: str) -> str | None:
    r"""The answer that a completion commits to: what its last `<answer>` holds, its box first.

    Without tags, the last `\boxed` of all; without either, None.
    """
    inside = tagged(text)
    found = boxed(text if inside is None else inside)
    return inside if found is None else found


def reference_of(text: str) -> str:
    r"""The answer in a column of a data set: its last `\boxed`, what follows `####`, or all."""
    found = boxed(text)
    if found is None:
        found = after_hashes(text)
    return text.strip() if found is None else found
