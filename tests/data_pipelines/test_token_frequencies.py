"""Counting tokens: every one, and one end of each text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipelines.shards.shards import write_shard
from data_pipelines.text_tokenizer import train_text_tokenizer
from data_pipelines.token_frequencies import main

TEXTS = ["red heart", "heart", "woman dark skin tone"] * 3


def test_job(tmp_path: Path) -> None:
    tokenizer = train_text_tokenizer(TEXTS, size=280)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    samples = [{"__key__": str(i), "txt": text.encode()} for i, text in enumerate(TEXTS)]
    write_shard(tmp_path / "shards/000000.tar", samples)
    main(str(tmp_path / "shards"), tmp_path / "tokenizer", tmp_path / "counts.pt")
    counts = torch.load(tmp_path / "counts.pt", weights_only=True)
    assert len(counts) == len(tokenizer)
    assert counts[tokenizer.eos_token_id] == len(TEXTS)
    ids = [i for text in TEXTS for i in tokenizer.encode(text)]
    assert int(counts.sum()) == len(ids) + len(TEXTS)
    for number in set(ids):
        assert counts[number] == ids.count(number)


def test_names_of_special_tokens_are_letters_and_changed_shards_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_text_tokenizer(TEXTS, size=280)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_shard(tmp_path / "x.tar", [{"__key__": "0", "txt": b"<|endoftext|> red"}])
    given = (str(tmp_path / "x.tar"), tmp_path / "tokenizer", tmp_path / "counts.pt")
    main(*given)
    assert torch.load(given[2], weights_only=True)[tokenizer.eos_token_id] == 1
    assert "1 read, 1 written" in capsys.readouterr().out
    main(*given)
    assert "counts.pt: already written" in capsys.readouterr().out
    write_shard(tmp_path / "x.tar", [{"__key__": "0", "txt": b"heart"}])
    with pytest.raises(ValueError, match=r"x\.tar has other contents"):
        main(*given)


def test_what_cannot_be(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", [{"__key__": "a", "png": b""}])
    with pytest.raises(ValueError, match=r"no tokenizer\.json there"):
        main(str(tmp_path / "x.tar"), tmp_path / "nowhere", tmp_path / "counts.pt")
    train_text_tokenizer(TEXTS, size=280).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="no sample has a txt"):
        main(str(tmp_path / "x.tar"), tmp_path / "tokenizer", tmp_path / "counts.pt")
    assert not (tmp_path / "counts.pt").exists()
