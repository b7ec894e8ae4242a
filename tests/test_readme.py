"""The README lists every file of the project once, and lists no other."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECTION = "## The files"
LINE = re.compile(r"^- `([^`]+)`: \S.*$")


def listed(readme: str) -> list[str]:
    """The paths of the lines "- `path`: what it is" of the section."""
    section = readme.split(f"{SECTION}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("-")]
    matches = [(line, LINE.match(line)) for line in lines]
    wrong = [line for line, match in matches if match is None]
    assert not wrong, f"not of the form '- `path`: what it is': {wrong}"
    return [match.group(1) for _, match in matches if match is not None]


def to_list(project_files: list[Path]) -> set[str]:
    """Sources, configurations, and the files at the root; weights and pictures are not listed."""
    return {
        path.as_posix()
        for path in project_files
        if len(path.parts) == 1
        or path.parts[0] == ".ci"
        or path.suffix in {".py", ".yaml", ".yml", ".toml"}
    }


def test_every_file_has_one_line_and_every_line_a_file(project_files: list[Path]) -> None:
    lines = listed((ROOT / "README.md").read_text())
    twice = [path for path, count in Counter(lines).items() if count > 1]
    assert not twice, f"listed more than once: {twice}"
    there = to_list(project_files)
    assert not there - set(lines), f"not listed in the README: {sorted(there - set(lines))}"
    assert not set(lines) - there, f"listed but not there: {sorted(set(lines) - there)}"


def test_local_links_lead_somewhere() -> None:
    readme = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", readme)
    local = {a or b for a, b in targets if not (a or b).startswith(("http", "#", "mailto:"))}
    missing = [target for target in local if not (ROOT / target.split("#")[0]).exists()]
    assert not missing, f"the README points to what is not there: {missing}"


def test_only_the_section_is_read() -> None:
    readme = f"- `a`: x\n{SECTION}\n\n- `b`: y\n\ntext\n- `c/d.py`: z\n\n## Next\n- `e`: w\n"
    assert listed(readme) == ["b", "c/d.py"]
