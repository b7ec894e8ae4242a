from __future__ import annotations

import pytest
import torch

from data_pipelines.jobs.report import Report
from data_pipelines.sources.row_files import rows_in
from data_pipelines.sources.text import Text, text_samples
from tests.data_pipelines.conftest import NumberTokenizer
from tests.templates.tiny import words_of


@pytest.fixture
def ids_of(vocabulary, tokenizer):
    def make(to_sequence, text, seed=0):
        (segment,) = to_sequence(
            {"__key__": "k", "__url__": "x.tar", "txt": text.encode()},
            vocabulary,
            tokenizer=tokenizer,
            generator=torch.Generator().manual_seed(seed),
        ).segments
        assert segment.target.all()
        return segment.ids.tolist()

    return make


def test_text_and_eos(ids_of):
    assert ids_of(Text(max_tokens=8), "1 2 3") == [1, 2, 3, 999]


def test_windows_reach_all_of_a_long_text(ids_of):
    windows = [ids_of(Text(max_tokens=4), "0 1 2 3 4 5", seed) for seed in range(60)]
    whole = [0, 1, 2, 3, 4, 5, 999]
    assert {tuple(w) for w in windows} == {tuple(whole[i : i + 4]) for i in range(4)}


def test_names_of_special_tokens_are_letters():
    """The one end of text is that which closes the document."""
    words = words_of("llada")
    named = "In <|mask|> is the mask and <|endoftext|> ends a text."
    (segment,) = Text(max_tokens=200)(
        {"__key__": "k", "__url__": "x.tar", "txt": named.encode()},
        words.vocabulary,
        tokenizer=words.tokenizer,
        generator=torch.Generator(),
    ).segments
    ids = segment.ids.tolist()
    assert words.vocabulary.mask_id not in ids
    assert ids.index(words.vocabulary.eos_id) == len(ids) - 1
    assert words.tokenizer.decode(ids[:-1]) == named


def test_of_a_very_long_text_a_part_is_tokenized(vocabulary, monkeypatch):
    monkeypatch.setattr("data_pipelines.sources.text.LONG_TEXT", 1000)

    class Counting(NumberTokenizer):
        longest = 0

        def encode(self, text, **options):
            self.longest = max(self.longest, len(text))
            return super().encode(text, **options)

    tokenizer, seen = Counting(), set()
    text = " ".join(str(n // 10) for n in range(9990))
    for seed in range(40):
        (segment,) = Text(max_tokens=4)(
            {"__key__": "k", "__url__": "x.tar", "txt": text.encode()},
            vocabulary,
            tokenizer=tokenizer,
            generator=torch.Generator().manual_seed(seed),
        ).segments
        assert len(segment.ids) == 4
        seen.add(int(segment.ids[0]) // 250)
    assert seen == {0, 1, 2, 3}  # all of it is seen over the epochs
    assert tokenizer.longest == 4 * 256 + 1000 < len(text)


def test_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a b", "n": 1}\n\n{"text": "ü"}\n', encoding="utf-8")
    report = Report()
    first, second = text_samples(rows_in(path), source=str(path), report=report)
    assert report.read == 2
    assert first["txt"] == b"a b"
    assert first["json"] == b'{"text": "a b", "n": 1}'
    assert second["txt"].decode() == "ü"
    assert first["__key__"] < second["__key__"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: no JSON"),
        ("[" * 200_000, "line 2: no JSON that can be read: its brackets are nested too deeply"),
        ('{"text": "cut \\ud83d"}', "line 2: half of a character"),
        ('{"n": 1}', "line 2: no text in 'text'"),
        ("[]", "line 2: no object"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    report = Report(0.02)
    (_good,) = text_samples(rows_in(path), source=str(path), report=report)
    (left_out,) = report.left_out
    assert message in f"{left_out.first[0].split(', ')[-1]}: {left_out.reason}"
    with pytest.raises(ValueError, match=f"1 of 2 samples are broken.*{message.split(': ')[1]}"):
        list(text_samples(rows_in(path), source=str(path), report=Report(0.0)))
    with pytest.raises(ValueError, match="y.jsonl cannot be read"):
        list(rows_in(tmp_path / "y.jsonl"))
