"""A model that is saved is loaded whole: tokenizers and defaults of generation included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmdlm
from mmdlm.templates.mmada import Mmada


def test_the_bundled_model_comes_back_whole(tmp_path: Path) -> None:
    model = mmdlm.load("emoji", device="cpu").with_generation(threshold=0.9)
    model.save_pretrained(tmp_path / "saved")
    again = mmdlm.load(tmp_path / "saved", device="cpu")
    assert again.defaults == model.defaults
    assert again.text_slots == model.text_slots
    assert again.image_tokenizer is not None

    def drawn(one: mmdlm.Model) -> bytes:
        generator = torch.Generator().manual_seed(0)
        return one.text_to_image("red heart", num_inference_steps=2, generator=generator)[
            0
        ].tobytes()

    image = model.text_to_image("red heart", num_inference_steps=2)[0]
    assert drawn(again) == drawn(model)
    assert again.caption(image) == model.caption(image)


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match="exists already"):
        mmdlm.load("emoji", device="cpu").save_pretrained(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["mine"]


def test_what_a_folder_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = mmdlm.load("emoji", device="cpu")
    with pytest.raises(ValueError, match="cannot hold the prompt template"):
        replace(model, prompt_template=Mmada(attend_pads=True)).save_pretrained(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_added_token_is_saved_with_its_model(tmp_path: Path) -> None:
    """The steps of a user who adds words: tokenizer, rows, save, load."""
    model = mmdlm.load("emoji", device="cpu")
    words, denoiser = model.text_tokenizer, model.denoiser
    image = model.text_to_image("red heart", num_inference_steps=2)[0]
    told = model.caption(image)
    assert words.add_tokens(["zeppelin", "okapi"]) == 2
    denoiser.resize_token_embeddings(denoiser.vocabulary.size + 2)
    model.save_pretrained(tmp_path / "saved")
    again = mmdlm.load(tmp_path / "saved", device="cpu")
    assert len(again.text_tokenizer) == again.denoiser.vocabulary.text[1]
    assert again.caption(image) == told
