"""Code blocks and commands of the README and of docs/, as the tests of this folder read them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?P<not_run><!-- not run: [^\n]+ -->\n)?(?P<indent> *)```(?P<language>\w+)\n"
    r"(?P<code>.*?)\n(?P=indent)```",
    re.DOTALL,
)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SHELLS = ("bash", "sh")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: Path relative to the root.
        line: Where the block begins, from 1.
        language: After the fence.
        code: Between the fences, without their indentation.
        runs: False where a comment before the fence gives a reason not to run it.
    """

    page: str
    line: int
    language: str
    code: str
    runs: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Return the README and the pages of docs/ that are written by hand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(*languages: str) -> list[Block]:
    """Return the fenced blocks in these languages."""
    found = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match["language"] in languages:
                indent = len(match["indent"])
                code = "\n".join(line[indent:] for line in match["code"].split("\n"))
                line = text.count("\n", 0, match.start("language")) + 1
                page = path.relative_to(ROOT).as_posix()
                found.append(Block(page, line, match["language"], code, match["not_run"] is None))
    return found


def commands(code: str) -> list[list[str]]:
    """Split a shell block into its commands, each as a list of words, without comments."""
    joined = code.replace("\\\n", " ")
    split = (shlex.split(line, comments=True) for line in joined.split("\n"))
    return [words for words in split if words]


def inline_commands() -> list[tuple[str, list[str]]]:
    """Return (page, words) of each command that stands between backticks in a sentence."""
    found = []
    for path in pages():
        text = FENCE.sub("", path.read_text(encoding="utf-8"))
        for code in INLINE.findall(text):
            if re.match(r"(mmdlm|make|\.venv/bin/\w+|python -m|accelerate launch|pip) \S", code):
                found.append((path.relative_to(ROOT).as_posix(), shlex.split(code)))
    return found
