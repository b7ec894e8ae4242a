from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from data_pipelines.jobs.report import Report
from data_pipelines.shards.shards import write_shard
from data_pipelines.text_tokenizer import (
    END_OF_TEXT,
    main,
    shard_texts,
    shortened,
    token_counts,
    train_text_tokenizer,
)

TEXTS = [
    "woman firefighter medium-dark skin tone",
    "Côte d\N{RIGHT SINGLE QUOTATION MARK}Ivoire",
    "A button (blood type)",
] * 9


def test_any_text_decodes_to_itself():
    tokenizer = train_text_tokenizer(TEXTS, size=300)
    for text in [*TEXTS, "", "never seen: ✓ 漢字 ü", "two  spaces", "trailing ", "it ' s . x"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, 0, 0], skip_special_tokens=True) == text
    assert tokenizer.encode("") == []


def test_ids():
    tokenizer = train_text_tokenizer(TEXTS, size=280)
    assert len(tokenizer) == 280
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.eos_token_id == 0
    assert (
        tokenizer.encode("skin") == tokenizer.encode("tone skin")[-len(tokenizer.encode("skin")) :]
    )


def test_training_is_repeatable():
    first, second = (train_text_tokenizer(TEXTS, size=300) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()


def test_job(tmp_path):
    samples = [{"__key__": str(i), "txt": text.encode()} for i, text in enumerate(TEXTS)]
    write_shard(tmp_path / "shards/000000.tar", samples)
    main(str(tmp_path / "shards"), tmp_path / "tokenizer", size=300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.eos_token_id == 0
    ids = tokenizer.encode(TEXTS[0], add_special_tokens=False)
    assert ids == train_text_tokenizer(TEXTS, size=300).encode(TEXTS[0])
    assert tokenizer.decode(ids) == TEXTS[0]


def test_job_reads_conversations_and_pairs_and_says_what_it_left_out(tmp_path, capsys):
    said = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "heart"}]
    contents = [
        {"messages": said},
        {"prompt": said[:1], "chosen": said[1:], "rejected": "blue"},
        {"nothing": 1},
    ]
    samples = [
        {"__key__": f"{n}", "json": json.dumps(content).encode()}
        for n, content in enumerate(contents)
    ]
    samples += [
        {"__key__": "3", "txt": b"\xff"},
        {"__key__": "4", "txt": b"\xef\xbb\xbfred"},
        {"__key__": "5", "json": b"[" * 200_000},
    ]
    write_shard(tmp_path / "x.tar", samples)
    report = Report(1.0)
    texts = list(shard_texts([str(tmp_path / "x.tar")], report=report))
    assert texts == ["red", "heart", "red", "heart", "blue", "red"]
    main(str(tmp_path / "x.tar"), tmp_path / "out", size=257, max_broken=0.05)
    assert "6 read, 3 written, 0 changed, 3 left out" in capsys.readouterr().out
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert index["report"] == report.to_dict()


def test_job_notices_other_settings_and_shards_that_have_changed(tmp_path, capsys):
    url, out = str(tmp_path / "x.tar"), tmp_path / "out"
    write_shard(tmp_path / "x.tar", [{"__key__": "0", "txt": b"red"}])
    main(url, out, size=257)
    main(url, out, size=257)
    assert "already written" in capsys.readouterr().out
    with pytest.raises(ValueError, match="size was 257, now 258"):
        main(url, out, size=258)
    write_shard(tmp_path / "x.tar", [{"__key__": "0", "txt": b"blue"}])
    with pytest.raises(ValueError, match=r"changed since: x\.tar has"):
        main(url, out, size=257)
    (out / "index.json").unlink()
    with pytest.raises(ValueError, match=r"no index\.json that says of what it was made"):
        main(url, out, size=257)


def test_a_shard_that_is_cut_short_is_named(tmp_path):
    path = tmp_path / "x.tar"
    write_shard(path, [{"__key__": f"{n}", "txt": b"red"} for n in range(9)])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"x\.tar: damaged tar.*after sample 3"):
        main(str(path), tmp_path / "out", size=257)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="at least 257"):
        train_text_tokenizer(TEXTS, size=256)
    write_shard(tmp_path / "x.tar", [{"__key__": "a", "png": b""}])
    with pytest.raises(ValueError, match="no sample has a txt"):
        main(str(tmp_path / "x.tar"), tmp_path / "tokenizer")


def test_a_text_is_shortened_to_so_many_tokens():
    tokenizer = train_text_tokenizer(["a red dog", "a red cat"] * 9, size=300)
    for text in ("a red dog and a red cat", "红色的狗和红色的猫", "🐕🐈"):
        (whole,) = token_counts(tokenizer, [text])
        assert shortened(tokenizer, text, whole) == text
        for most in range(1, whole):
            short = shortened(tokenizer, text, most)
            assert text.startswith(short)
            assert token_counts(tokenizer, [short])[0] <= most
