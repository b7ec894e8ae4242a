"""Check that a tag may be released, and make the links of the README absolute, as PyPI needs them.

python .ci/release.py --tag v0.2.0 --repository https://github.com/OWNER/NAME
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\(|(?:src|href)=\")(?![a-z]+:|#|//)([^)\"\s]+)")
IMAGES = (".png", ".gif", ".jpg", ".svg")


def version(root: Path) -> str:
    """Return the version, which stands in mmdlm/__init__.py alone."""
    tree = ast.parse((root / "mmdlm/__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise ValueError("mmdlm/__init__.py has no __version__")


def problems(root: Path, tag: str) -> list[str]:
    """Return what keeps a tag from being released; empty where nothing does."""
    own = version(root)
    found = [] if tag == f"v{own}" else [f"the tag is {tag}, but mmdlm.__version__ is {own}"]
    cited = re.search(r"^version: (\S+)$", (root / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    if cited is None or cited[1] != own:
        found.append(f"CITATION.cff has the version {cited and cited[1]}, not {own}")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(own)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        found.append(f"CHANGELOG.md has no section [{own}] with a date")
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)^## \[", changes, re.MULTILINE | re.DOTALL)
    if unreleased is not None and unreleased[1].strip():
        found.append(f"CHANGELOG.md has unreleased changes; move them to [{own}]")
    return found


def absolute(text: str, repository: str, ref: str) -> str:
    """Return Markdown whose relative links and images lead to a commit or tag of a repository."""

    def link(match: re.Match[str]) -> str:
        kind = "raw" if match[2].partition("#")[0].lower().endswith(IMAGES) else "blob"
        return f"{match[1]}{repository.rstrip('/')}/{kind}/{ref}/{match[2]}"

    return LINK.sub(link, text)


def main() -> None:
    """Check the tag, and rewrite README.md in place."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tag", required=True, help="such as v0.2.0")
    parser.add_argument("--repository", help="address that relative links of README.md begin with")
    given = parser.parse_args()
    if found := problems(ROOT, given.tag):
        print("\n".join(f"error: {one}" for one in found), file=sys.stderr)
        sys.exit(2)
    if given.repository:
        path = ROOT / "README.md"
        text = absolute(path.read_text(encoding="utf-8"), given.repository, given.tag)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
