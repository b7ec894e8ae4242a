"""Samples that are blank or all alike are told from samples that are not."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipelines.shards.shards import read_shard
from data_pipelines.sources.source import Source
from data_pipelines.sources.vision_samples import SeenCaption
from mmdlm.vision.image_files import open_image
from train.stages.samples import SampleSheet, first_captions, lost_variety

IMAGES = str(Path(__file__).parents[1] / "data/emoji_images.tar")


def blank(seed: int) -> Image.Image:
    """White, but for the noise of a decoder."""
    noise = np.random.default_rng(seed).normal(0, 2, (64, 64, 3))
    return Image.fromarray((250 + noise).clip(0, 255).astype(np.uint8))


def spot(x: int, color: str = "red") -> Image.Image:
    image = blank(x)
    ImageDraw.Draw(image).ellipse((x, 8, x + 24, 32), fill=color)
    return image


VARIED = [spot(2), spot(30), spot(20, "blue"), spot(10, "green")]


def test_images_of_several_things_are_varied() -> None:
    assert lost_variety(VARIED) is None
    assert lost_variety([spot(2)]) is None
    assert lost_variety([*VARIED, blank(0)]) is None


def test_blank_ones_are_counted() -> None:
    assert lost_variety([blank(n) for n in range(4)]) == "4 of 4 samples are nearly blank"
    assert lost_variety([blank(0), blank(1), spot(2)]) == "2 of 3 samples are nearly blank"


def test_the_same_image_for_every_prompt() -> None:
    assert lost_variety([spot(2)] * 3) == "all 3 samples look alike, whatever their prompts"


def test_the_first_images_of_each_source_are_shown_with_their_captions() -> None:
    sources = [Source(IMAGES, SeenCaption(16)), Source(IMAGES, SeenCaption(16))]
    samples = list(islice(read_shard(IMAGES), 3))
    found = first_captions(sources, 3)
    assert [text for _, text in found] == [one["txt"].decode() for one in samples] * 2
    assert found[1][0].tobytes() == open_image(samples[1]["png"]).tobytes()
    assert first_captions(sources, 0) == []


@pytest.mark.parametrize("images, warned", [([blank(0)] * 2, True), (VARIED[:2], False)])
def test_a_sheet_warns(
    images: list[Image.Image], warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = SimpleNamespace(
        text_to_image=lambda prompts: images, caption=lambda given: ["a"] * 2
    )
    nothing: Any = None
    sheet = SampleSheet(
        nothing,
        nothing,
        nothing,
        tmp_path,
        prompt_template=nothing,
        defaults=nothing,
        prompts=["a", "b"],
    )
    with caplog.at_level(logging.WARNING):
        sheet.write(7, model)
    assert ("step 7: 2 of 2 samples are nearly blank" in caplog.text) == warned
    assert (tmp_path / "step_00000007.png").is_file()
