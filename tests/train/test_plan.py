"""Sizes and steps follow from images, time and speed, and are decided once."""

from __future__ import annotations

import pytest
import torch

from mmdlm import load
from train.image_folder.plan import (
    BATCH,
    BUNDLED_SHAPE,
    BUNDLED_SIZE,
    BUNDLED_SLOTS,
    EPOCHS,
    FEWEST,
    LEAST,
    SHAPES,
    Grid,
    Pace,
    Plan,
    choose,
    settings_for,
    shape_for,
    training,
)

CPU = torch.device("cpu")


def test_what_is_decided_stays(tmp_path):
    plan = Plan(tmp_path / "plan.json")
    assert plan.once("steps", lambda: 3) == 3
    assert Plan(tmp_path / "plan.json").once("steps", lambda: 4) == 3


def test_the_bundled_model_is_what_the_plan_takes_it_for():
    model = load("emoji")
    shape = SHAPES[BUNDLED_SHAPE].shape(length=82, text_slots=BUNDLED_SLOTS)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(model.denoiser.config, name) == getattr(shape, name)
    assert model.text_slots == BUNDLED_SLOTS
    assert model.image_tokenizer.image_size == BUNDLED_SIZE
    assert model.image_tokenizer.config | Grid(BUNDLED_SIZE).tokenizer == (
        model.image_tokenizer.config
    )


def test_more_time_and_more_images_make_a_larger_model():
    sizes = [
        shape_for(images, seconds=seconds, codes=64, flops_per_second=5e10)
        for images, seconds in ((3000, 60), (3000, 4000), (3000, 4e6), (10_000, 4e6), (10**6, 4e6))
    ]
    assert sizes == [0, 1, 1, 2, 3]
    # Four times the codes of an image take a longer time.
    assert shape_for(3000, seconds=4000, codes=256, flops_per_second=5e10) == 0


def test_the_bundled_model_is_the_start_where_it_fits(monkeypatch):
    monkeypatch.setattr("train.image_folder.plan.speed", lambda device: 5e10)
    usual = {"images": 3000, "lengths": [5] * 100, "seconds": 3600.0, "device": CPU}
    assert choose("auto", Grid(64), **usual).start == "emoji"
    assert choose("nothing", Grid(64), **usual).start == "nothing"
    assert choose("auto", Grid(32), **usual).start == "nothing"
    long = choose("auto", Grid(64), **{**usual, "lengths": [5] * 90 + [40] * 10})
    assert long.start == "nothing"
    assert "10% of the captions" in long.why
    much = choose("auto", Grid(64), **{**usual, "images": 10**6, "seconds": 1e7})
    assert (much.start, much.number) == ("nothing", 3)
    with pytest.raises(ValueError, match="it draws 64 pixels, not 32"):
        choose("emoji", Grid(32), **usual)


@pytest.mark.parametrize("stage", ["image_tokenizer", "model"])
def test_steps_fill_the_time(stage):
    pace = Pace(step=0.5, look=3.0)
    settings = settings_for(stage, pace, seconds=1000.0, images=10**6, learned=False)
    looks = -(-settings["steps"] // settings["sample_steps"])
    assert 950 < settings["steps"] * pace.step + looks * pace.look <= 1000
    assert 2 <= looks <= 12
    assert settings["save_steps"] * pace.step <= 120


def test_a_small_set_is_not_seen_for_ever_and_a_short_time_is_enough_for_some_steps():
    fast, slow = Pace(step=0.001, look=0.1), Pace(step=10.0, look=10.0)
    long = settings_for("model", fast, seconds=1e5, images=3200, learned=False)
    assert long["steps"] == EPOCHS["model"] * 3200 // BATCH
    few = settings_for("model", fast, seconds=1e5, images=8, learned=False)
    assert few["steps"] == LEAST["model"]
    short = settings_for("model", slow, seconds=1.0, images=8, learned=True)
    assert short["steps"] == FEWEST
    assert training("model", **short, seed=0).optimizer.learning_rate == 0.01


def test_sizes_that_are_not_offered():
    for size in (16, 33, 136, 512):
        with pytest.raises(ValueError, match=f"size is {size}"):
            Grid(size)
    assert [Grid(size).codes for size in (32, 64, 128, 256)] == [16, 64, 256, 256]
