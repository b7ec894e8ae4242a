"""Text of files: one text whichever editor saved it, and what is no text is said to be none."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest

from data_pipelines.sources.row_files import BrokenRow, Row, read_rows, rows_in
from data_pipelines.sources.text_files import decoded, parsed, read_text

TEXT = "a réd square\nand 🟥"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
        TEXT.replace("\n", "\r\n").encode("utf-8-sig"),
        TEXT.replace("\n", "\r\n").encode("utf-16"),
        TEXT.replace("\n", "\r").encode(),
    ],
)
def test_a_text_is_the_same_whichever_editor_saved_it(data: bytes) -> None:
    assert decoded(data) == TEXT


@pytest.mark.parametrize(
    "data, says",
    [
        ("é".encode("latin-1"), r"no text in UTF-8 \(at 0\); save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"a", "no text in UTF-16"),
        ("a red square".encode("utf-16-le"), "zero bytes, as UTF-16 without its mark"),
    ],
)
def test_what_is_no_text(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=says):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "no JSON"),
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ('["cut \\ud83d"]', r"half of a character \(\\ud83d\)"),
        ('{"\\uDE00": 1}', r"half of a character \(\\ude00\)"),
        ("9" * 5000, "digits"),
    ],
)
def test_what_is_no_json(text: str, says: str) -> None:
    for given in (text, text.encode()):
        with pytest.raises(ValueError, match=says):
            parsed(given)


def test_whole_characters_that_are_escaped_are_json() -> None:
    assert parsed(json.dumps([TEXT, "\\ud83d"])) == [TEXT, "\\ud83d"]


ROWS = [{"text": "one é"}, {"text": "two\nlines"}]
FORMS = {
    ".jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    ".json": json.dumps(ROWS, ensure_ascii=False),
    ".csv": 'text\none é\n"two\nlines"\n',
}


@pytest.mark.parametrize("ending", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_rows_are_the_same_whichever_editor_saved_them(
    ending: str, encoding: str, newline: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(FORMS[ending].replace("\n", newline).encode(encoding))
    assert [row.values for row in read_rows(path)] == ROWS


def test_marks_in_the_middle_of_files_that_were_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(2 * (codecs.BOM_UTF8 + b'{"text": "a"}\n'))
    assert [row.values for row in read_rows(path)] == 2 * [{"text": "a"}]


@pytest.mark.parametrize(
    "ending, text",
    [
        (".jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n{"text": "b"}\n'),
        (".csv", b"text\na\n\xe9\nb\n"),
        (".json", b'[{"text": "a"}, {"text": "\\ud83d"}, {"text": "b"}]'),
        (".json", b'[{"text": "a"}, 3, {"text": "b"}]'),
        (".csv", b"text\na\nb,c\nb\n"),
    ],
)
def test_a_broken_row_is_named_and_those_after_it_are_read(
    ending: str, text: bytes, tmp_path: Path
) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(text)
    first, broken, last = rows_in(path)
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert (first["text"], last["text"]) == ("a", "b")
    assert isinstance(broken, BrokenRow)
    assert broken.where.endswith(" 2")
    with pytest.raises(ValueError, match=f"a{ending}, .* 2: "):
        read_rows(path)
