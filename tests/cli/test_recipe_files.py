"""Recipe files that are no texts, too large, or unfold to more than anybody has written."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdlm.cli.recipe_files import MOST_BYTES, check_recipes

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    "content, says",
    [
        (LAUGHS.encode(), "unfolds to more than 100,000 values by its anchors"),
        (b"&a [*a]", "unfolds to more than 100,000 values"),
        (b"out: \xe2x", r"is no text in UTF-8 \(at 5\); save it as UTF-8"),
        (b"#" * (MOST_BYTES + 1), "has 10,000,001 bytes; a recipe has at most 10,000,000"),
    ],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_it_is_named(content: bytes, says: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        check_recipes(["--out", "x", *form.format(path).split()])
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content", [b"out: x", b"a: &a {b: 1}\nc: *a\nd: *a", b"", b"[", b"- " * 5000, b"!!python/x 1"]
)
def test_others_are_left_to_the_parser(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    check_recipes(["--config", str(tmp_path / "a.yaml")])
    check_recipes(["--config", str(tmp_path / "nowhere.yaml"), "--config"])
