"""Conversations and their images from files: forms, columns, and rows that cannot be used."""

from __future__ import annotations

import inspect
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.jobs.report import Report
from data_pipelines.shards.shards import expand_urls, read_shard
from data_pipelines.sources.conversation_files import Columns, conversation_samples
from data_pipelines.sources.row_files import Row
from data_pipelines.sources.rows import rows_of
from data_pipelines.sources.source import field_image
from data_pipelines.write_shards import conversations as write_conversations
from mmdlm.vision.image_files import open_image
from tests.data_pipelines.tiny_vision import plain

PAIR = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def packed(out: Path) -> list[dict[str, Any]]:
    return [
        {**one, "json": json.loads(one["json"])}
        for url in expand_urls(out)
        for one in read_shard(url)
    ]


def test_llava_json_with_images_beside_it(tmp_path: Path) -> None:
    (tmp_path / "images/coco").mkdir(parents=True)
    (tmp_path / "images/coco/a.png").write_bytes(plain(3))
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "this"}]
    rows: list[dict[str, Any]] = [
        {"id": "1", "image": "coco/a.png", "conversations": turns},
        {"id": "2", "conversations": [{"from": "human", "value": "x"}, turns[1]]},
        {"id": "3", "image": "coco/gone.png", "conversations": turns},
        {"id": "4", "conversations": turns[1:]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write_conversations(
        str(tmp_path / "a.json"), tmp_path / "out", images=tmp_path / "images", max_broken=0.5
    )
    first, second = packed(tmp_path / "out")
    assert first["png"] == plain(3)
    assert first["json"]["messages"][0] == {"role": "user", "content": "<image>\nwhat"}
    assert "png" not in second
    with pytest.raises(ValueError, match="2 of 4 samples .* no such file"):
        write_conversations(
            str(tmp_path / "a.json"), tmp_path / "o", images=tmp_path / "images", max_broken=0.015
        )


def test_templates_over_columns(tmp_path: Path) -> None:
    rows = [{"question": "q", "steps": ["one", "two"], "answer": "a"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    write_conversations(
        str(tmp_path / "a.jsonl"),
        tmp_path / "out",
        prompt="{question}?",
        completion="<think>{steps[0]}</think>{answer}",
        system="S",
    )
    assert packed(tmp_path / "out")[0]["json"]["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q?"},
        {"role": "assistant", "content": "<think>one</think>a"},
    ]


def test_parquet_with_images_inside(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    pytest.importorskip("datasets", reason="datasets is not installed")
    import pyarrow as pa

    rows = [
        {
            "messages": [{"role": "user", "content": "<image><image>"}, PAIR[1]],
            "images": [{"bytes": plain(n), "path": None} for n in (1, 2)],
        }
    ]
    (tmp_path / "set").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "set/a.parquet")
    write_conversations(str(tmp_path / "set"), tmp_path / "out")
    (one,) = packed(tmp_path / "out")
    assert (one["0.png"], one["1.png"]) == (plain(1), plain(2))


def test_a_data_set_of_the_hub_is_read_by_subset_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row, with images as the files that they are there."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    photo = io.BytesIO()  # which would be another file if it were decoded
    Image.new("RGB", (8, 8), "red").save(photo, format="JPEG")
    turns = [{"role": "user", "content": "<image> what?"}, PAIR[1]]
    rows = [
        {"messages": PAIR, "images": []},
        {"messages": turns, "images": [{"bytes": photo.getvalue(), "path": None}]},
    ]
    asked: list[Any] = []
    theirs = inspect.signature(datasets.load_dataset)  # by its own names of what it is given

    def load_dataset(*names: Any, **options: Any) -> Any:
        asked.append(theirs.bind(*names, **options).arguments)
        stored = datasets.Dataset.from_list(rows)
        images = datasets.List(datasets.Image())
        return stored.cast_column("images", images).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    write_conversations("owner/talks", tmp_path / "out", split="test", subset="german")
    options = {"name": "german", "split": "test", "streaming": True}
    assert asked == [{"path": "owner/talks", **options}]
    first, second = packed(tmp_path / "out")
    assert first["json"]["messages"] == PAIR
    assert second["json"]["messages"] == turns
    assert second["jpg"] == photo.getvalue()


def test_a_data_set_that_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def load_dataset(*names: Any, **options: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("it is not\nthere")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"data set owner/gone cannot be read \(it is not there\)"):
        list(rows_of("owner/gone"))


@pytest.mark.parametrize(
    "rows, options, says",
    [
        ([{"a": 1, "b": 2}], {}, "has the columns a, b: no messages, no conversations, and no"),
        ([{"a": "1"}], {"prompt": "a", "completion": "b"}, "the columns a, of which 'b' cannot"),
        ([{"a": "1"}], {"prompt": "{a}", "completion": "{b[0]}"}, "of which '{b.0.}' cannot"),
        ([{"a": "1"}], {"prompt": "{a", "completion": "a"}, "'{a' is no template"),
        ([{"a": 1}], {"prompt": "a", "completion": "a"}, "of which 'a' cannot be made"),
        ([{"a": 1}], {"prompt": "a"}, "name both prompt and completion"),
        ([], {}, "is empty"),
    ],
)
def test_a_data_set_without_the_columns(
    rows: list[Any], options: dict[str, str], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=says):
        write_conversations(str(path), tmp_path / "out", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.json", "{", "a.json: no JSON"),
        ("a.json", "{}", "no list of objects but dict"),
        ("a.txt", "", "read from .jsonl, .json, .csv, .parquet"),
        ("gone.json", None, "no such file"),
    ],
)
def test_files_that_cannot_be_read(
    name: str, content: str | None, says: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        list(rows_of(str(tmp_path / name)))


@pytest.mark.parametrize("value", [None, ["one", "two"]])
def test_what_is_no_text_is_not_learned_as_its_name(value: object) -> None:
    """One row of ten: it is counted and left out."""
    rows = [{"q": "hi", "a": "yes"}] * 9 + [{"q": "hi", "a": value}]
    found, report = samples_of(rows, Columns("{q}?", "It is {a}."))
    assert (len(found), report.broken) == (9, 1)
    assert "no text but" in report.left_out[0].reason


def test_csv_is_read_with_long_fields_and_told_of_columns_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\nhi," + "y" * 200_000 + "\n")
    (row,) = rows_of(str(path))
    assert len(row["completion"]) == 200_000
    path.write_text("prompt,prompt\na,b\n")
    with pytest.raises(ValueError, match="has the column 'prompt' twice"):
        list(rows_of(str(path)))


def test_broken_rows_are_named_and_left_out(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "a", "completion": "b"})
    lines = [good, '{"prompt": "\xe9"}', "[" * 200_000, '{"prompt": "\\ud83d"}', "3", good]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="latin-1")
    write_conversations(str(tmp_path / "a.jsonl"), tmp_path / "out", max_broken=0.5)
    assert len(packed(tmp_path / "out")) == 2
    report = json.loads((tmp_path / "out/index.json").read_text())["report"]
    assert (report["read"], report["written"], report["broken"]) == (6, 2, 4)
    listed = [name for cases in report["left_out"] for name in cases["first"]]
    assert listed == [f"{tmp_path}/a.jsonl, line {n}" for n in (2, 3, 4, 5)]


# ---- what a row has beside its messages ---------------------------------------------------------


def samples_of(rows: list[dict[str, Any]], columns: Columns) -> tuple[list[Any], Report]:
    report = Report(1.0)
    given = [Row(row, f"row {number}") for number, row in enumerate(rows)]
    found = conversation_samples(given, columns, source="rows", report=report)
    return [json.loads(one["json"])["messages"] for one in found], report


def test_a_system_prompt_beside_a_conversation_is_its_first_message() -> None:
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Arr!"}]
    pirate = {"role": "system", "content": "Talk like a pirate."}
    rows: list[dict[str, Any]] = [
        {"conversations": turns, "system": pirate["content"], "tools": ""},
        {"conversations": turns, "system_prompt": pirate["content"], "tools": "[search]"},
        {"prompt": "Hello", "completion": "Arr!", "system": pirate["content"]},
        {"conversations": [{"from": "system", "value": "S"}, *turns], "system": "S"},
        {"conversations": [{"from": "system", "value": "S"}, *turns], "system": "other"},
        {"conversations": turns, "system": None},
        {"conversations": turns, "system": ["a list"]},
    ]
    found, report = samples_of(rows, Columns())
    assert [one[0] for one in found[:3]] == [pirate] * 3
    assert [one[0]["content"] for one in found[3:]] == ["S", "S", "Hello"]
    assert report.unused == {"tools": 1, "system": 1}  # said, as they are in no sample
    (broken,) = report.left_out
    assert broken.reason == "its 'system' is no text but list"


def test_a_system_prompt_beside_named_columns() -> None:
    row = {"q": "Hello", "a": "Arr!", "system_prompt": "Talk like a pirate.", "id": 7}
    (beside,), report = samples_of([row], Columns("q", "a", "default"))
    assert beside[0] == {"role": "system", "content": "Talk like a pirate."}
    assert report.unused == {"id": 1}
    (inside,), _ = samples_of([row], Columns("{system_prompt} {q}", "a"))
    assert [one["role"] for one in inside] == ["user", "assistant"]
    (default,), _ = samples_of([{"q": "Hello", "a": "Arr!"}], Columns("q", "a", "default"))
    assert default[0] == {"role": "system", "content": "default"}


def test_messages_behind_the_last_answer_are_counted() -> None:
    rows = [{"messages": [*PAIR, *PAIR[:count]]} for count in (0, 1, 2)]
    rows.append({"messages": [*PAIR, PAIR[0], {**PAIR[1], "weight": 0}], "system": "S"})
    found, report = samples_of(rows, Columns())
    assert [len(one) for one in found] == [2, 2, 4, 3]
    (changed,) = report.changed
    assert (changed.count, changed.first) == (2, ["row 1", "row 3"])
    assert "behind its last answer" in changed.reason


def test_keys_of_messages_that_are_not_used_are_said() -> None:
    answer = {**PAIR[1], "reasoning_content": "since I", "name": None}
    _, report = samples_of([{"messages": [PAIR[0], answer]}], Columns())
    assert report.unused == {"messages.reasoning_content": 1}


@pytest.mark.parametrize("name", ["../secret.png", "{root}/secret.png", "link.png"])
def test_images_outside_of_their_folder_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(plain(3))
    (tmp_path / "images/link.png").symlink_to(tmp_path / "secret.png")
    name = name.format(root=tmp_path)
    row = {"messages": [{"role": "user", "content": "<image>"}, PAIR[1]], "image": name}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=re.escape(f"'{name}' is outside of the folder")):
        write_conversations(
            str(tmp_path / "a.jsonl"), tmp_path / "out", images=tmp_path / "images", max_broken=0
        )
    write_conversations(
        str(tmp_path / "a.jsonl"), tmp_path / "o", images=tmp_path / "images", allow_outside=True
    )
    assert packed(tmp_path / "o")[0]["png"] == plain(3)


def test_images_that_are_stored_anew_look_as_they_did(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    halves = Image.new("RGB", (80, 40), "red")
    halves.paste("white", (0, 0, 40, 40))
    two = {"save_all": True, "append_images": [halves]}  # in one JPEG, as telephones write them
    halves.save(tmp_path / "phone.jpg", "MPO", exif=exif, **two)
    halves.save(tmp_path / "scan.tif", exif=exif)
    ramp = np.linspace(0, 40000, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "grey.tif")
    names = ["phone.jpg", "scan.tif", "grey.tif"]
    turns = [{"role": "user", "content": "<image>"}, PAIR[1]]
    rows = [{"messages": turns, "image": name} for name in names]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    write_conversations(str(tmp_path / "rows.json"), tmp_path / "out", images=tmp_path)
    report = json.loads((tmp_path / "out/index.json").read_text())["report"]
    (changed,) = report["changed"]
    assert (changed["count"], changed["reason"]) == (
        2,
        "an image of another format is stored as PNG",
    )
    for name, sample in zip(names, packed(tmp_path / "out"), strict=True):
        assert field_image(sample).tobytes() == open_image(tmp_path / name).tobytes()
