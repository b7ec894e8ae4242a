"""Keyword arguments of tasks: unknown ones come with the nearest, None leaves the model's own."""

from __future__ import annotations

from typing import Any

import pytest

from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.pipeline.images import ImageTasks
from mmdlm.pipeline.inputs import generation_config_with
from mmdlm.pipeline.options import (
    ChatOptions,
    ImageOptions,
    SamplingOptions,
    StepOptions,
    TextOptions,
    check_options,
    sampling_options,
)
from mmdlm.pipeline.text import TextTasks


@pytest.mark.parametrize(
    ("kind", "name", "nearest"),
    [
        (ImageOptions, "guidance_scal", "guidance_scale"),
        (ImageOptions, "num_inference_step", "num_inference_steps"),
        (TextOptions, "max_new_token", "max_new_tokens"),
        (ChatOptions, "block_len", "block_length"),
        (StepOptions, "generators", "generator"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(kind: Any, name: str, nearest: str) -> None:
    message = f"task\\(\\) got an unexpected keyword argument '{name}'; did you mean {nearest}\\?"
    with pytest.raises(TypeError, match=message):
        check_options({name: 3}, kind, task="task")


def test_a_keyword_like_no_other_names_all() -> None:
    with pytest.raises(TypeError, match="argument 'zzz'; known are generator, num_inference_steps"):
        check_options({"zzz": 3}, StepOptions, task="caption")


@pytest.mark.parametrize(
    ("tasks", "name"),
    [
        (ImageTasks, "caption"),
        (ImageTasks, "text_to_image"),
        (ImageTasks, "draw_trajectory"),
        (TextTasks, "answer"),
        (TextTasks, "chat"),
        (TextTasks, "complete"),
        (TextTasks, "infill"),
    ],
)
def test_each_task_refuses_unknown_keywords_before_all_else(tasks: type, name: str) -> None:
    model = object.__new__(tasks)  # without a denoiser: nothing of it is looked at
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'seed'"):
        getattr(model, name)("a", seed=3)


def test_options_of_a_call_reach_the_config() -> None:
    given: Any = {"guidance_scale": 3.0, "think": True, "num_inference_steps": None, "height": 8}
    kept = sampling_options(given)
    assert kept == {"guidance_scale": 3.0, "num_inference_steps": None}
    assert set(kept) <= SamplingOptions.__optional_keys__
    config = generation_config_with(GenerationConfig(7), **kept)
    assert config == GenerationConfig(7, guidance_scale=3.0)
