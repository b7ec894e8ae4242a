"""Pairs of answers: their forms, both in one row, and rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.shards.loader import build_loader
from data_pipelines.shards.shards import expand_urls, read_shard, write_shard
from data_pipelines.sources.conversations import apply_chat_template
from data_pipelines.sources.preferences import Preference
from data_pipelines.sources.source import Source
from data_pipelines.sources.vision_samples import attach_vision
from data_pipelines.write_shards import preferences as write_preferences
from mmdlm.core.sequence import Batch, Sequence, collate, pack, text_segment
from mmdlm.templates.auto import LAYOUTS
from mmdlm.templates.text_codec import TextCodec
from tests.data_pipelines.test_conversations import short
from tests.data_pipelines.tiny_vision import plain
from tests.templates.tiny import words_of


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


ASKED = [turn("user", "hi")]
YES, NO = [turn("assistant", "yes")], [turn("assistant", "no")]
EXPLICIT = {"prompt": ASKED, "chosen": YES, "rejected": NO}


def sources(urls: str, words: TextCodec, *, length: int, **options: Any) -> list[Source]:
    given = [Source(urls, Preference(**options))]
    return attach_vision(
        apply_chat_template(given, LAYOUTS["llada"], words, length=length, packed=True), None
    )


def pair(content: Any, **options: Any) -> list[str]:
    """Chosen and rejected, as `short` writes them."""
    words = words_of("llada")
    (source,) = sources("x.tar", words, length=200, **options)
    sample = {"__key__": "k", "__url__": "x.tar", "json": json.dumps(content).encode()}
    sequence = source.to_sequence(
        sample, words.vocabulary, tokenizer=words.tokenizer, generator=torch.Generator()
    )
    return [short(one, words) for one in sequence.documents]


@pytest.mark.parametrize(
    "content",
    [
        EXPLICIT,
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": "hi", "chosen": YES, "rejected": "no"},
        {"chosen": [*ASKED, *YES], "rejected": [*ASKED, *NO]},
        {"prompt": "hi", "chosen": [*ASKED, *YES], "rejected": [*ASKED, *NO]},
    ],
)
def test_every_form_is_one_pair(content: dict[str, Any]) -> None:
    assert pair(content) == ["^u:hi.a:[yes.]", "^u:hi.a:[no.]"]
    assert pair(content, system="Z")[1] == "^s:Z.u:hi.a:[no.]"


def test_only_the_last_answers_are_learned() -> None:
    before = [*ASKED, turn("assistant", "hm"), turn("user", "so")]
    content = {"prompt": before, "chosen": YES, "rejected": NO}
    assert pair(content)[0] == "^u:hi.a:hm.u:so.a:[yes.]"
    with pytest.raises(ValueError, match="answers 'every'"):
        Preference(answers="every")


@pytest.mark.parametrize(
    "content, says",
    [
        ([], "no chosen answer with a rejected one"),
        ({"prompt": "hi", "chosen": "yes"}, "no chosen answer with a rejected one"),
        ({"chosen": "yes", "rejected": "no"}, "its prompt is neither a text nor messages"),
        ({**EXPLICIT, "chosen": 3}, "its chosen answer is neither a text nor messages"),
        ({**EXPLICIT, "rejected": [*NO, *ASKED]}, "rejected messages do not end with an answer"),
        ({**EXPLICIT, "rejected": YES}, "its chosen and rejected answers are the same"),
        ({**EXPLICIT, "rejected": " "}, "message 2, of the assistant, is empty"),
        ({**EXPLICIT, "chosen": [turn("user", "x"), *YES]}, "are not to the same prompt"),
    ],
)
def test_what_is_no_pair(content: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pair(content)


# ---- rows ----------------------------------------------------------------------------------------


def loaded(out: Path, *, length: int, rows: int) -> Batch:
    words = words_of("llada")
    loader = build_loader(
        sources(str(out), words, length=length),
        words.vocabulary,
        tokenizer=words.tokenizer,
        batch_size=rows,
        length=length,
        packed=True,
        shuffle_buffer=0,
        repeat=False,
        max_broken=0.5,
    )
    batch = next(iter(loader))
    assert [source["broken"] for source in loader.stats()] == [1]
    return batch


def test_a_pair_stays_in_one_row_and_a_prompt_without_room_is_skipped(tmp_path: Path) -> None:
    """Four documents in a row; the long prompt leaves none for its answers, and is counted."""
    contents: list[Any] = [{**EXPLICIT, "prompt": "x" * 200}]
    contents += [{"prompt": "hi", "chosen": "a" * n, "rejected": "b"} for n in (1, 9, 4)]
    samples = [
        {"__key__": f"{n}", "json": json.dumps(one).encode()} for n, one in enumerate(contents)
    ]
    write_shard(tmp_path / "0.tar", samples)
    batch = loaded(tmp_path, length=120, rows=2)
    assert batch.document.amax(1).tolist() == [3, 1]
    for row in range(2):
        for number in range(int(batch.document[row].max()) + 1):
            here = (batch.document[row] == number) & batch.target[row]
            letters = batch.ids[row][here].tolist()[:-1]  # but the end of the turn
            assert set(letters) == set(words_of("llada").encode_with_specials("ab"[number % 2]))


def test_a_partner_has_positions_of_its_own_and_counts_into_the_length() -> None:
    vocabulary = words_of("llada").vocabulary
    rejected = Sequence((text_segment([4, 5]),))
    chosen = Sequence((text_segment([1, 2, 3]),), partner=rejected)
    assert len(chosen) == 5
    for batch in (collate([chosen], vocabulary), pack([chosen], vocabulary, length=5)):
        assert batch.document.tolist() == [[0, 0, 0, 1, 1]]
        assert batch.position.tolist() == [[0, 1, 2, 0, 1]]
        assert batch.segment.tolist() == [[0, 0, 0, 1, 1]]


# ---- files ---------------------------------------------------------------------------------------


def written(out: Path) -> list[Any]:
    return [json.loads(one["json"]) for url in expand_urls(out) for one in read_shard(url)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What prefers nothing is left out, counted and named."""
    rows = [{"q": "hi", "w": "yes", "l": "no"}, {"q": "hi", "w": "no", "l": "no"}]
    text = {
        ".json": json.dumps(rows),
        ".jsonl": "\n".join(map(json.dumps, rows)),
        ".csv": "q,w,l\nhi,yes,no\nhi,no,no\n",
    }[Path(name).suffix]
    (tmp_path / name).write_text(text)
    write_preferences(
        str(tmp_path / name),
        tmp_path / "out",
        prompt="q",
        chosen="w",
        rejected="l",
        max_broken=0.5,
    )
    assert written(tmp_path / "out") == [EXPLICIT]
    said = capsys.readouterr().out
    assert "1 left out" in said
    assert f"its chosen and rejected answers are the same ({tmp_path / name}, " in said


def test_images_of_the_prompt_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(plain(3))
    row = {"prompt": "<image> what", "chosen": "yes", "rejected": "no", "images": ["a.png"]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    write_preferences(str(tmp_path / "a.json"), tmp_path / "out", images=tmp_path)
    (one,) = (sample for url in expand_urls(tmp_path / "out") for sample in read_shard(url))
    assert one["png"] == plain(3)


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "a", "answer": "b"}, "columns prompt, answer, but no chosen and no rejected; "),
        ({"chosen": "a", "rejected": "b"}, "columns chosen, rejected, but no prompt; name columns"),
    ],
)
def test_a_file_without_the_columns(row: Any, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=says):
        write_preferences(str(tmp_path / "a.json"), tmp_path / "out")
