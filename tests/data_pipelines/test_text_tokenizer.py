from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from data_pipelines.shards import write_shard
from data_pipelines.text_tokenizer import END_OF_TEXT, main, train_text_tokenizer

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


def test_what_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="at least 257"):
        train_text_tokenizer(TEXTS, size=256)
    write_shard(tmp_path / "x.tar", [{"__key__": "a", "png": b""}])
    with pytest.raises(ValueError, match="no sample has a txt"):
        main(str(tmp_path / "x.tar"), tmp_path / "tokenizer")
