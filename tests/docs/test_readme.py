"""The README points only to what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_local_links_lead_somewhere() -> None:
    readme = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", readme)
    local = {a or b for a, b in targets if not (a or b).startswith(("http", "#", "mailto:"))}
    missing = [target for target in local if not (ROOT / target.split("#")[0]).exists()]
    assert not missing, f"the README points to what is not there: {missing}"
