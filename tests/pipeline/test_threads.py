"""One model from several threads: each call gives what it gives alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from mmdlm import load
from mmdlm.core.kernels.linear import Linear, PackedLayers
from mmdlm.templates.text_codec import TextCodec
from tests.templates.tiny import words_of

THREADS = 8


def at_once(calls: list[Callable[[], object]]) -> list[object]:
    """What calls give from threads that begin together."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda call: call(), calls))


def calls_of(folder: Path) -> list[Callable[[], object]]:
    """25 short calls of every kind on one model."""
    model = load(folder, device="cpu")
    image = Image.new("RGB", (16, 16), (200, 40, 40))
    mask = Image.new("L", (16, 16), 255)
    hasty = model.with_generation(threshold=0.5)
    cached = model.with_generation(cache="dual")

    def rng(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def drawn(seed: int) -> bytes:
        images = model.text_to_image("red heart", num_inference_steps=3, generator=rng(seed))
        return images[0].tobytes()

    def steps(seed: int) -> list[bytes]:
        frames = model.draw_trajectory("red heart", num_inference_steps=3, generator=rng(seed))
        return [frame[0].tobytes() for frame in frames]

    def mended(seed: int) -> bytes:
        return model.inpaint(image, mask, num_inference_steps=3, generator=rng(seed)).tobytes()

    makers: list[Callable[[int], object]] = [
        drawn,
        steps,
        mended,
        lambda seed: model.caption([image] * (1 + seed % 2), num_inference_steps=4),
        lambda seed: hasty.caption(image, num_inference_steps=4),
        lambda seed: cached.infill("woman [MASK:3] skin", num_inference_steps=4),
        lambda seed: model.infill("red [MASK]" + " heart" * seed, num_inference_steps=5),
    ]
    return [(lambda make=make, seed=seed: make(seed)) for seed in range(4) for make in makers][:25]


@pytest.mark.slow
def test_threads_that_share_a_model_get_what_each_gets_alone(tiny_checkpoint: Path) -> None:
    calls = calls_of(tiny_checkpoint)
    alone = [call() for call in calls]
    numbers = list(range(len(calls))) * THREADS
    random.Random(0).shuffle(numbers)
    fresh = calls_of(tiny_checkpoint)  # of a model that nothing is packed of yet
    together = at_once([fresh[number] for number in numbers])
    assert together == [alone[number] for number in numbers]


@torch.no_grad()
def test_a_thread_that_leaves_packed_layers_unpacks_no_other() -> None:
    stack = nn.Sequential(Linear(16, 24), nn.Tanh(), Linear(24, 8))
    x, packed = torch.randn(5, 16), PackedLayers(stack)
    expected = stack(x)

    def other() -> bool:
        before = stack[0].packed
        with packed:
            stack(x)
        return before is None

    with packed:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(other).result()
        assert stack[0].packed is not None
        with packed:
            pass
        assert stack[0].packed is not None
        torch.testing.assert_close(stack(x), expected)
    assert stack[0].packed is None


def test_threads_read_special_names_each_in_its_own_way() -> None:
    words = words_of("llada")
    text = "a <|endoftext|> and <|mask|>"
    readers = [TextCodec.encode_with_specials, TextCodec.encode] * THREADS
    alone = [reader(words, text) for reader in readers]
    assert alone[0] != alone[1]

    def often(reader: Callable[[TextCodec, str], list[int]]) -> list[list[int]]:
        return [reader(words, text) for _ in range(300)]

    found = at_once([lambda reader=reader: often(reader) for reader in readers])
    assert found == [[one] * 300 for one in alone]
