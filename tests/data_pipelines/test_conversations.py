"""Conversations: their forms, what of them is learnt, how they end, and what cannot be used."""

from __future__ import annotations

import inspect
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.conversation_files import Columns, conversation_samples, rows_of
from data_pipelines.conversations import Conversation, Message, messages_of, speak
from data_pipelines.end_of_text import FilledTail, FixedTail, NoTail, RandomTail, Tail
from data_pipelines.loader import build_loader
from data_pipelines.seen import Eye, see_through
from data_pipelines.shards import Sample, expand_urls, read_shard, write_shard
from data_pipelines.source import Source, encode_array, field_image
from data_pipelines.stream import Tally
from data_pipelines.write_shards import conversations as write_conversations
from mmdlm.core.sequence import Batch, Sequence
from mmdlm.layouts.layout import Layout
from mmdlm.layouts.layouts import LAYOUTS
from mmdlm.layouts.words import Words
from mmdlm.vision.image_files import open_image
from tests.data_pipelines.eyes import SQUARE, adapter, plain
from tests.layouts.tiny import ids_of, targets_of, words_of

SAID = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e")]
TALK = [{"role": role, "content": text} for role, text in SAID]
PAIR = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def spoken(
    conversation: Conversation,
    content: Any,
    family: str = "llada",
    *,
    length: int = 400,
    seed: int = 0,
    eye: Eye | None = None,
    layout: Layout | None = None,
    **fields: bytes,
) -> tuple[Sequence, Words]:
    words = words_of(family)
    given = {"messages": content} if isinstance(content, list) else content
    sample: Sample = {"__key__": "k", "__url__": "x.tar", "json": json.dumps(given).encode()}
    sample |= {name.replace("_", "."): value for name, value in fields.items()}
    sources = speak(
        [Source("x.tar", conversation)],
        layout or LAYOUTS[family],
        words,
        length=length,
        packed=False,
    )
    (source,) = see_through(sources, None)
    through = source.to_sequence
    if eye is not None:
        from data_pipelines.seen import Through

        through = Through(through.seeing, eye)
    generator = torch.Generator().manual_seed(seed)
    sequence = through(sample, words.vocabulary, tokenizer=words.tokenizer, generator=generator)
    return sequence, words


def learnt(sequence: Sequence, words: Words) -> str:
    """Its text, targets in brackets, pictures as their slots, ends of text as $."""
    parts = []
    for segment in sequence.segments:
        if segment.views is not None:
            parts.append(f"<{len(segment.ids)}>")
            continue
        text = words.tokenizer.decode(segment.ids).replace("<|endoftext|>", "$")
        parts.append(f"[{text}]" if bool(segment.target.all()) and text else text)
    return "".join(parts)


def short(sequence: Sequence, words: Words) -> str:
    """The same with LLaDA's markers as single letters."""
    text = learnt(sequence, words)
    text = re.sub(r"<\|start_header_id\|>(\w)\w*<\|end_header_id\|>\n\n", r"\1:", text)
    return text.replace("<|startoftext|>", "^").replace("<|eot_id|>", ".")


NONE = Conversation(tail=NoTail())


# ---- forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {"messages": PAIR},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": " yes\n"}]},
        {"prompt": "hi", "completion": "yes"},
        {"prompt": PAIR[:1], "completion": PAIR[1:]},
        {"messages": [*PAIR, {"role": "user", "content": "never answered"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, PAIR[1]]},
    ],
)
def test_every_form_is_one_conversation(content: dict[str, Any]) -> None:
    question, answer = messages_of(content)
    assert question == Message("user", "hi")
    assert (answer.role, answer.text.strip()) == ("assistant", "yes")
    assert short(*spoken(NONE, content)) == "^u:hi.a:[yes.]"


def test_a_system_message_is_added_where_there_is_none() -> None:
    system = Conversation(tail=NoTail(), system="Z")
    assert short(*spoken(system, PAIR)) == "^s:Z.u:hi.a:[yes.]"
    assert "Z" not in short(*spoken(system, TALK))


def test_pictures_stand_where_they_are_mentioned() -> None:
    first = [{"type": "text", "text": "x "}, {"type": "image"}, {"type": "text", "text": "?"}]
    content = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "<image>\nz"},
        {"role": "assistant", "content": "w"},
    ]
    fields = {"0.png": plain(1), "1.png": plain(2)}
    sequence, words = spoken(NONE, content, "llada_v", eye=Eye(SQUARE), **fields)
    assert short(sequence, words).split("user.", 1)[-1].endswith("u:x <4>?.a:[y.]u:<4>\nz.a:[w.]")


def test_codes_are_read_for_a_model_of_codes() -> None:
    content = [{"role": "user", "content": "<image>\nwhat?"}, PAIR[1]]
    codes = {"codes_npy": encode_array(np.arange(6, dtype=np.uint16).reshape(2, 3))}
    sequence, words = spoken(NONE, content, "mmada", **codes)
    first = len(words.tokenizer)
    assert ids_of(sequence)[2:8] == list(range(first, first + 6))
    drawn = [PAIR[0], {"role": "assistant", "content": "<image>"}]
    sequence, words = spoken(Conversation(), drawn, "mmada", **codes)
    taught = targets_of(sequence)
    assert [ids_of(sequence)[i] for i in taught] == list(range(first, first + 6))


def test_prompts_are_dropped_where_a_picture_is_drawn() -> None:
    """As often as is said, and as the other branch of guidance leaves them out."""
    codes = {"codes_npy": encode_array(np.arange(4, dtype=np.uint16))}
    drawn = [PAIR[0], {"role": "assistant", "content": "<image>"}]
    drop = Conversation(drop_prompt=0.25)
    found = [spoken(drop, drawn, "mmada", seed=seed, **codes) for seed in range(80)]
    texts = [learnt(sequence, words).split("<|soi|>")[0] for sequence, words in found]
    assert set(texts) == {"<|t2i|><|startoftext|>hi$", "<|t2i|><|startoftext|>$"}
    assert 8 < texts.count("<|t2i|><|startoftext|>$") < 34
    whole, _ = spoken(Conversation(drop_prompt=1.0, tail=NoTail()), PAIR)
    assert ids_of(whole) == ids_of(spoken(NONE, PAIR)[0])
    with pytest.raises(ValueError, match="drop_prompt is 2"):
        Conversation(drop_prompt=2.0)


def test_without_a_template() -> None:
    plain_text = Conversation(template=False, tail=NoTail())
    assert learnt(*spoken(plain_text, PAIR)) == "hi[yes$]"
    with pytest.raises(ValueError, match="5 messages are not one question and its answer"):
        spoken(plain_text, TALK)


def test_spaces_are_kept_where_a_text_goes_on_and_dropped_in_a_conversation() -> None:
    code = [{"role": "user", "content": "def f:\n"}, {"role": "assistant", "content": "  yes\n"}]
    plain_text = Conversation(template=False, tail=NoTail())
    assert learnt(*spoken(plain_text, code)) == "def f:\n[  yes\n$]"
    assert "[yes" in learnt(*spoken(NONE, code))


def test_answers_that_think_are_asked_to() -> None:
    content = [PAIR[0], {"role": "assistant", "content": "<think> hm </think> yes"}, *PAIR]
    asked = short(*spoken(Conversation(tail=NoTail(), thinking=True), content, "llada_v"))
    assert "u:hi /think.a:[<think> hm </think> yes.]u:hi.a:[yes.]" in asked
    assert "/think." not in short(*spoken(NONE, content, "llada_v"))


def test_a_drawing_that_was_thought_about_is_asked_for_once() -> None:
    content = [PAIR[0], {"role": "assistant", "content": "<think> x </think><image>"}]
    codes = {"codes_npy": encode_array(np.arange(4, dtype=np.uint16))}
    sequence, words = spoken(Conversation(thinking=True), content, "mmada", **codes)
    text = learnt(sequence, words)
    assert "You should first think out a more detailed version" in text
    assert text.count("You should first think") == 1


# ---- what is learnt -----------------------------------------------------------------------------


def test_every_answer_the_last_or_one_at_random() -> None:
    every = "^s:S.u:a.a:[b.]u:c.a:[d e.]"
    last = "^s:S.u:a.a:b.u:c.a:[d e.]"
    first = "^s:S.u:a.a:[b.]"
    assert short(*spoken(NONE, TALK)) == every
    assert short(*spoken(Conversation(answers="last", tail=NoTail()), TALK)) == last
    one = Conversation(answers="one", tail=NoTail())
    drawn = [short(*spoken(one, TALK, seed=seed)) for seed in range(60)]
    assert set(drawn) == {first, last}
    assert 15 < drawn.count(first) < 45
    assert drawn == [short(*spoken(one, TALK, seed=seed)) for seed in range(60)]


@pytest.mark.parametrize(
    "tail, ends",
    [(NoTail(), 0), (FixedTail(), 1), (FixedTail(3), 3), (FilledTail(), 12), (FilledTail(5), 5)],
)
def test_how_an_answer_ends(tail: Tail, ends: int) -> None:
    sequence, words = spoken(Conversation(tail=NoTail()), PAIR)
    whole, _ = spoken(Conversation(tail=tail), PAIR, length=len(sequence) + 12)
    assert len(whole) == len(sequence) + ends
    assert ids_of(whole)[len(sequence) :] == [words.vocabulary.eos_id] * ends
    assert len(targets_of(whole)) == 4 + ends  # y, e, s and the end of the turn
    exact, _ = spoken(Conversation(tail=tail), PAIR, length=len(sequence))
    assert len(exact) == len(sequence)


@pytest.mark.parametrize(
    "answer, bound",
    [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (15, 16), (16, 16), (17, 32), (33, 48), (48, 48)],
)
def test_random_lengths_end_at_a_round_number(answer: int, bound: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {RandomTail().count(answer=answer, room=999, generator=generator) for _ in range(400)}
    assert drawn == set(range(bound - answer + 1))


def test_a_filled_row_leaves_nothing_to_pack() -> None:
    words = words_of("llada")
    for tail, works in ((FilledTail(), False), (FilledTail(8), True), (RandomTail(), True)):
        source = Source("x", Conversation(tail=tail))
        if works:
            speak([source], LAYOUTS["llada"], words, length=9, packed=True)
            continue
        with pytest.raises(ValueError, match="leaves nothing to pack"):
            speak([source], LAYOUTS["llada"], words, length=9, packed=True)


# ---- through shards -----------------------------------------------------------------------------


def talks(count: int) -> list[Sample]:
    return [
        {
            "__key__": f"{n:03d}",
            "json": json.dumps({"messages": [*TALK[:4], *PAIR[1:], *PAIR] + [PAIR[0]] * (n % 2)})
            .replace('"hi"', f'"question {n}"')
            .encode(),
        }
        for n in range(count)
    ]


def test_draws_resume_exactly(tmp_path: Path) -> None:
    """The turn and the tail of each conversation, in packed rows."""
    write_shard(tmp_path / "a.tar", talks(7))
    words = words_of("llada")
    source = Source(str(tmp_path), Conversation(answers="one", tail=RandomTail()))

    def loader() -> Any:
        sources = speak([source], LAYOUTS["llada"], words, length=300, packed=True)
        return build_loader(
            see_through(sources, None),
            words.vocabulary,
            tokenizer=words.tokenizer,
            batch_size=2,
            length=300,
            packed=True,
            shuffle_buffer=4,
        )

    first = loader()
    batches = iter(first)
    before = [next(batches) for _ in range(5)]
    state = first.state_dict()
    expected = [next(batches) for _ in range(6)]
    again = loader()
    again.load_state_dict(state)
    continued = iter(again)

    def same(one: Batch, other: Batch) -> bool:
        return all(
            torch.equal(getattr(one, n), getattr(other, n)) for n in ("ids", "target", "document")
        )

    assert all(same(next(continued), batch) for batch in expected)
    assert not same(before[0], expected[0])


def test_an_answer_that_does_not_fit_is_a_broken_sample(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", talks(2))
    words = words_of("llada")
    sources = speak(
        [Source(str(tmp_path), Conversation())], LAYOUTS["llada"], words, length=20, packed=False
    )
    options: dict[str, Any] = {"tokenizer": words.tokenizer, "batch_size": 1, "length": 20}
    batches = build_loader(see_through(sources, None), words.vocabulary, max_broken=0, **options)
    with pytest.raises(ValueError, match=r"sample 00.: \d+ tokens do not fit in a row of 20"):
        next(iter(batches))


def test_an_answer_may_be_cut_where_the_row_ends() -> None:
    cut = Conversation(cut_long_answers=True)
    whole, words = spoken(NONE, TALK)
    assert short(whole, words).endswith("a:[d e.]")
    for length, end in (
        (len(whole), "a:[d e.]"),
        (len(whole) - 1, "a:[d e]"),
        (len(whole) - 3, "a:[d]"),
    ):
        sequence, _ = spoken(cut, TALK, length=length)
        assert short(sequence, words).endswith(end)
        assert len(sequence) == length
    with_nothing_left, _ = spoken(cut, TALK, length=len(whole) - 4)
    assert len(with_nothing_left) == len(whole)  # the stream counts it
    dimple = LAYOUTS["dimple"]
    both, words = spoken(NONE, PAIR, "dimple", layout=dimple)
    sequence, _ = spoken(cut, PAIR, "dimple", layout=dimple, length=len(both) - 2)
    assert learnt(sequence, words).endswith("[ye]")


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, says",
    [
        ({"texts": []}, "neither messages nor conversations, nor a prompt"),
        ([], "neither messages nor conversations"),
        (["x"], "a message is no object but 'x'"),
        ([{"role": "user"}], "no role and text"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "neither text nor image"),
        (PAIR[:1], "its 1 messages hold no answer"),
        (PAIR[1:], "starts with the assistant"),
        ([TALK[0], PAIR[1]], "starts with the assistant"),
        ([*PAIR, PAIR[1]], "message 3 is the second of the assistant in a row"),
        ([PAIR[0], {"role": "assistant", "content": " "}], "message 2, of the assistant, is empty"),
        ([{"role": "user", "content": ""}, PAIR[1]], "message 1, of the user, is empty"),
        ([{"role": "tool", "content": "x"}, *PAIR], "the role 'tool', not one of"),
        ([{"role": "user", "content": "<image>"}, PAIR[1]], "mention 1 pictures .* but it has 0"),
    ],
)
def test_conversations_that_cannot_be_used(content: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        spoken(NONE, content)


def test_pictures_for_a_model_that_sees_none() -> None:
    content = [{"role": "user", "content": "<image>"}, PAIR[1]]
    with pytest.raises(ValueError, match=r"it has pictures \(png\), but this model \(llada\) sees"):
        spoken(NONE, content, png=plain(1))
    with pytest.raises(ValueError, match="no codes of them; data_pipelines.tokenize_images"):
        spoken(NONE, content, "mmada", png=plain(1))
    with pytest.raises(ValueError, match="mention 1 pictures .* but it has 2"):
        spoken(NONE, content, "llada_v", eye=Eye(SQUARE), **{"0.png": plain(1), "1.png": plain(1)})


def test_settings_without_meaning() -> None:
    with pytest.raises(ValueError, match="answers 'all' is not one of"):
        Conversation(answers="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens is 0"):
        FixedTail(0)


# ---- files --------------------------------------------------------------------------------------


def packed(out: Path) -> list[dict[str, Any]]:
    return [
        {**one, "json": json.loads(one["json"])}
        for url in expand_urls(out)
        for one in read_shard(url)
    ]


def test_llava_json_with_pictures_beside_it(tmp_path: Path) -> None:
    (tmp_path / "pictures/coco").mkdir(parents=True)
    (tmp_path / "pictures/coco/a.png").write_bytes(plain(3))
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "this"}]
    rows: list[dict[str, Any]] = [
        {"id": "1", "image": "coco/a.png", "conversations": turns},
        {"id": "2", "conversations": [{"from": "human", "value": "x"}, turns[1]]},
        {"id": "3", "image": "coco/gone.png", "conversations": turns},
        {"id": "4", "conversations": turns[1:]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write_conversations(
        str(tmp_path / "a.json"), tmp_path / "out", images=tmp_path / "pictures", max_broken=0.5
    )
    first, second = packed(tmp_path / "out")
    assert first["png"] == plain(3)
    assert first["json"]["messages"][0] == {"role": "user", "content": "<image>\nwhat"}
    assert "png" not in second
    columns, tally = Columns(images=tmp_path / "pictures"), Tally(0.015)
    with pytest.raises(ValueError, match="2 of 4 samples .* No such file"):
        list(conversation_samples(rows, columns, source="a.json", tally=tally))


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


def test_parquet_with_pictures_inside(tmp_path: Path) -> None:
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


def test_pictures_that_are_stored_anew_look_as_they_did(tmp_path: Path) -> None:
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
    for name, sample in zip(names, packed(tmp_path / "out"), strict=True):
        assert field_image(sample).tobytes() == open_image(tmp_path / name).tobytes()


def test_a_data_set_of_the_hub_is_read_by_subset_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row, with pictures as the files that they are there."""
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
        pictures = datasets.List(datasets.Image())
        return stored.cast_column("images", pictures).to_iterable_dataset()

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
        ("a.json", "{}", "no list of conversations but dict"),
        ("a.json", "[3]", "entry 0: no object but 3"),
        ("a.jsonl", '{"messages": []}\n3\n', "line 2: no object but 3"),
        ("a.txt", "", "read from .json, .jsonl, .csv, .parquet"),
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


def test_a_model_with_eyes_looks_at_conversations(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", talks(1))
    words = words_of("llada")
    source = Source(str(tmp_path / "a.tar"), Conversation())
    spoken_ = speak([source], LAYOUTS["llada"], words, length=9, packed=False)
    (through,) = see_through(spoken_, adapter())
    assert through.to_sequence.eye.tiling == SQUARE


@pytest.mark.parametrize("value", [None, ["one", "two"]])
def test_what_is_no_text_is_not_learnt_as_its_name(value: object) -> None:
    """One row of ten: it is counted and left out."""
    rows = [{"q": "hi", "a": "yes"}] * 9 + [{"q": "hi", "a": value}]
    tally = Tally(0.5)
    columns = Columns("{q}?", "It is {a}.")
    found = list(conversation_samples(rows, columns, source="rows", tally=tally))
    assert (len(found), tally.broken) == (9, 1)
    assert "no text but" in tally.listed[0].reason


def test_csv_is_read_with_long_fields_and_told_of_columns_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\nhi," + "y" * 200_000 + "\n")
    (row,) = rows_of(str(path))
    assert len(row["completion"]) == 200_000
    path.write_text("prompt,prompt\na,b\n")
    with pytest.raises(ValueError, match="has the column 'prompt' twice"):
        list(rows_of(str(path)))


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": "a", "completion": "b"}).encode())
    assert len(list(rows_of(str(path)))) == 1
    path.write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(ValueError, match="no text in UTF-8"):
        list(rows_of(str(path)))
