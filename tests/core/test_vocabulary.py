"""One id space: ranges that do not overlap, and codes that come back."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from mmdlm.core.vocabulary import Modality, Vocabulary


def test_build_lays_out_text_specials_and_codes():
    vocabulary = Vocabulary.build(text_size=100, eos_id=7, image_codes=32)
    start, stop = vocabulary.range(Modality.IMAGE)
    specials = {
        vocabulary.mask_id,
        vocabulary.pad_id,
        vocabulary.begin_image_id,
        vocabulary.end_image_id,
    }
    assert vocabulary.range(Modality.TEXT) == (0, 100)
    assert stop - start == vocabulary.image_codes == 32
    assert stop == vocabulary.size
    assert len(specials) == 4
    assert all(100 <= special < start for special in specials)


def test_codes_round_trip():
    vocabulary = Vocabulary.build(text_size=100, eos_id=7, image_codes=32)
    codes = torch.arange(32).view(4, 8)
    ids = vocabulary.image_ids(codes)
    assert ids.min() == vocabulary.image[0]
    assert ids.max() == vocabulary.image[1] - 1
    assert torch.equal(vocabulary.codes(ids), codes)


def test_text_only_has_an_empty_image_range():
    vocabulary = Vocabulary.build(text_size=100, eos_id=7)
    assert vocabulary.image_codes == 0
    assert vocabulary.size == 104


def test_survives_json():
    vocabulary = Vocabulary.build(text_size=100, eos_id=7, image_codes=32)
    assert Vocabulary(**json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary


@pytest.mark.parametrize("modality", [Modality.CONTROL, Modality.FEATURE])
def test_only_generated_modalities_have_a_range(modality: Modality):
    with pytest.raises(ValueError, match=modality.name):
        Vocabulary.build(text_size=10, eos_id=0).range(modality)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": (50, 60)}, "overlap"),
        ({"image": (104, 1000)}, "image range"),
        ({"text": (10, 5)}, "text range"),
        ({"mask_id": 999}, "mask_id 999"),
        ({"eos_id": 120}, "eos_id 120"),
    ],
)
def test_refuses_what_does_not_fit(change: dict, message: str):
    vocabulary = Vocabulary.build(text_size=100, eos_id=7, image_codes=32)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(vocabulary, **change)
