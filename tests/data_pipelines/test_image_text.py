from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipelines.sources.image_text import ImageText, Tasks, expect_codes, slots_of
from data_pipelines.sources.source import Source, encode_array
from mmdlm.core.sequence import collate
from mmdlm.core.vocabulary import Modality
from tests.templates.tiny import words_of

CODES = [5, 0, 49, 7]
SLOTS = 5
TEXT = [11, 12, 999, 999, 999]  # two tokens, then eos


@pytest.fixture
def sample():
    return {
        "__key__": "k",
        "__url__": "x.tar",
        "txt": b"11 12",
        "json": b'{"names": {"de": "21 22"}, "captions": ["31", "32"], "number": 3}',
        "codes.npy": encode_array(np.array(CODES, np.uint16).reshape(2, 2)),
    }


@pytest.fixture
def batch_of(sample, vocabulary, tokenizer):
    def make(to_sequence, seed=0, **changed):
        sequence = to_sequence(
            {**sample, **changed},
            vocabulary,
            tokenizer=tokenizer,
            generator=torch.Generator().manual_seed(seed),
        )
        return collate([sequence], vocabulary)

    return make


def only(task: str) -> Tasks:
    return Tasks(**{"draw": 0.0, "caption": 0.0, "joint": 0.0, "text": 0.0, task: 1.0})


@pytest.mark.parametrize(
    "task, targets",
    [
        ("draw", {Modality.IMAGE}),
        ("caption", {Modality.TEXT}),
        ("joint", {Modality.IMAGE, Modality.TEXT}),
    ],
)
def test_layout_and_targets(batch_of, vocabulary, task, targets):
    batch = batch_of(ImageText(only(task), text_slots=SLOTS, drop_condition=0.0))
    first = vocabulary.image[0]
    assert batch.ids[0].tolist() == [
        vocabulary.begin_image_id,
        *[first + code for code in CODES],
        vocabulary.end_image_id,
        *TEXT,
    ]
    for modality in (Modality.TEXT, Modality.IMAGE, Modality.CONTROL):
        assert (batch.target[batch.of(modality)] == (modality in targets)).all()


def test_text_alone(batch_of):
    batch = batch_of(ImageText(only("text"), text_slots=SLOTS))
    assert batch.ids[0].tolist() == TEXT
    assert batch.target.all()


@pytest.mark.parametrize("task", ["draw", "caption"])
def test_a_dropped_condition_is_what_guidance_uses(batch_of, vocabulary, task):
    kept = batch_of(ImageText(only(task), text_slots=SLOTS, drop_condition=0.0))
    dropped = batch_of(ImageText(only(task), text_slots=SLOTS, drop_condition=1.0))
    twin = kept.without_context(vocabulary)
    assert torch.equal(dropped.ids, twin.ids)
    assert torch.equal(dropped.target, twin.target)
    assert not torch.equal(dropped.ids, kept.ids)


def test_shares(batch_of, vocabulary):
    to_sequence = ImageText(Tasks(2, 1, 1, 0), text_slots=SLOTS, drop_condition=0.25)
    found = Counter()
    for seed in range(2000):
        batch = batch_of(to_sequence, seed)
        image = bool(batch.target[batch.of(Modality.IMAGE)].any())
        text = bool(batch.target[batch.of(Modality.TEXT)].any())
        dropped = bool((batch.ids == vocabulary.mask_id).any())
        found[("joint" if image and text else "draw" if image else "caption", dropped)] += 1
    assert found[("joint", True)] == 0
    draw = found[("draw", True)] + found[("draw", False)]
    assert draw / 2000 == pytest.approx(0.5, abs=0.05)
    assert found[("draw", True)] / draw == pytest.approx(0.25, abs=0.06)
    assert found[("joint", False)] / 2000 == pytest.approx(0.25, abs=0.04)


def test_the_generator_decides(batch_of):
    to_sequence = ImageText(Tasks(1, 1, 1, 1), text_slots=SLOTS, drop_condition=0.5)
    for seed in range(20):
        first, second = batch_of(to_sequence, seed), batch_of(to_sequence, seed)
        assert torch.equal(first.ids, second.ids)
        assert torch.equal(first.target, second.target)


def test_empty_text_is_all_eos(batch_of, vocabulary):
    batch = batch_of(ImageText(only("text"), text_slots=SLOTS), txt=b"")
    assert batch.ids[0].tolist() == [vocabulary.eos_id] * SLOTS


def test_text_fills_all_slots_but_eos(batch_of):
    batch = batch_of(ImageText(only("text"), text_slots=3))
    assert batch.ids[0].tolist() == [11, 12, 999]


def test_long_text(batch_of):
    with pytest.raises(ValueError, match="needs 2 tokens and eos but text_slots is 2"):
        batch_of(ImageText(only("text"), text_slots=2))
    batch = batch_of(ImageText(only("text"), text_slots=2, cut_long_text=True))
    assert batch.ids[0].tolist() == [11, 12]


def test_texts_in_json(batch_of):
    batch = batch_of(ImageText(only("text"), text_slots=SLOTS, text="json.names.de"))
    assert batch.ids[0].tolist() == [21, 22, 999, 999, 999]
    to_sequence = ImageText(only("text"), text_slots=SLOTS, text="json.captions")
    assert {int(batch_of(to_sequence, seed).ids[0, 0]) for seed in range(20)} == {31, 32}


@pytest.mark.parametrize(
    "options, changed, message",
    [
        ({"text": "json.names.fr"}, {}, "its json has no 'names.fr'"),
        ({"text": "json.number"}, {}, "is no text but int"),
        ({"text": "json.names"}, {"json": b"{"}, "Expecting property name"),
        ({"text": "caption"}, {}, r"no 'caption' among its fields \(txt, json, codes.npy\)"),
        ({}, {"txt": b"\xff"}, "no text in UTF-8"),
        ({}, {"codes.npy": encode_array(np.array([50]))}, "50 image codes"),
        ({}, {"codes.npy": encode_array(np.array([-1]))}, "50 image codes"),
        ({}, {"codes.npy": encode_array(np.zeros(4))}, "holds float64"),
        ({}, {"codes.npy": b"nothing"}, "no numpy array"),
        ({}, {"codes.npy": encode_array(np.arange(4))[:-3]}, "truncated"),
        ({"codes": "vq.npy"}, {}, "tokenize_images adds the codes"),
    ],
)
def test_samples_that_cannot_be_used(batch_of, options, changed, message):
    with pytest.raises(ValueError, match=message):
        batch_of(ImageText(only("joint"), text_slots=SLOTS, **options), **changed)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ImageText(text_slots=0), "text_slots is 0"),
        (lambda: ImageText(drop_condition=1.5), "drop_condition is 1.5"),
        (lambda: Tasks(0, 0, 0, 0), "one is positive"),
        (lambda: Tasks(-1, 1, 1, 1), "not negative"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_names_of_special_tokens_are_letters():
    words = words_of("llada")
    named = "a <|mask|> and <|endoftext|>"
    ids = slots_of(
        named, 90, vocabulary=words.vocabulary, tokenizer=words.tokenizer, cut_long_text=False
    ).tolist()
    assert words.vocabulary.mask_id not in ids
    end = ids.index(words.vocabulary.eos_id)
    assert words.tokenizer.decode(ids[:end]) == named
    assert set(ids[end:]) == {words.vocabulary.eos_id}


def test_a_very_long_text_is_cut_before_it_is_tokenized(batch_of, tokenizer, monkeypatch):
    longest = []
    real = type(tokenizer).encode

    def encode(self, text, **options):
        longest.append(len(text))
        return real(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "encode", encode)
    text = b"12 " * 3_000_000
    batch = batch_of(ImageText(only("text"), text_slots=SLOTS, cut_long_text=True), txt=text)
    assert batch.ids[0].tolist() == [12] * SLOTS
    with pytest.raises(ValueError, match="needs at least .* text_slots is 5"):
        batch_of(ImageText(only("text"), text_slots=SLOTS), txt=text)
    assert max(longest) < 10_000


@pytest.mark.parametrize("count", [3, 5, 9])
def test_codes_of_the_wrong_number_are_refused(batch_of, count):
    """As many as the image tokenizer of the model makes; or as the source says itself."""
    given = ImageText(only("draw"), text_slots=SLOTS, drop_condition=0.0)
    (source,) = expect_codes([Source("x.tar", given)], 4)
    batch_of(source.to_sequence)
    codes = {"codes.npy": encode_array(np.zeros(count, np.uint16))}
    with pytest.raises(ValueError, match=f"its codes.npy has {count} codes, but an image has 4"):
        batch_of(source.to_sequence, **codes)
    (own,) = expect_codes([replace(source, to_sequence=replace(given, codes_per_image=count))], 4)
    batch_of(own.to_sequence, **codes)
