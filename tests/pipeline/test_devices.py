"""On a device without float64 (Apple's GPUs) the sampler's state stays on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmdlm import load
from mmdlm.core.sampling.device_denoiser import DeviceDenoiser
from mmdlm.pipeline import devices
from mmdlm.pipeline.model import Model


class WithoutFloat64(TorchDispatchMode):
    """Fails where an operation takes or gives float64, as that device does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, result)):
            if isinstance(one, torch.Tensor):
                assert one.dtype != torch.float64, f"{function} with float64"
        return result


def held(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what would run on the device run without float64."""
    for owner, name in (
        (DeviceDenoiser, "hidden"),
        (DeviceDenoiser, "logits_at"),
        (type(model.image_tokenizer), "encode"),
        (type(model.image_tokenizer), "decode"),
    ):
        whole = getattr(owner, name)

        def without(*args, whole=whole, **kwargs):
            with WithoutFloat64():
                return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, without)


def test_results_are_those_of_a_device_with_float64(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_checkpoint, device="cpu")

    def results() -> list[object]:
        image = model.text_to_image("red heart", num_inference_steps=3, guidance_scale=2.0)[0]
        cached = model.with_generation(cache="stable").text_to_image("red heart")[0]
        return [
            image.tobytes(),
            cached.tobytes(),
            model.caption(image, num_inference_steps=3),
            model.complete("red", max_new_tokens=4, temperature=1.0),
        ]

    wanted = results()
    monkeypatch.setattr(Model, "_sampled", property(lambda m: DeviceDenoiser(m.denoiser, m.device)))
    held(model, monkeypatch)
    assert results() == wanted


def test_a_model_on_such_a_device_is_sampled_on_the_cpu() -> None:
    assert devices.sampling_device(torch.device("mps:0")) == torch.device("cpu")
    assert devices.sampling_device(torch.device("cuda:0")) == torch.device("cuda:0")


def test_apples_gpu_is_chosen_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.device_named(None) == torch.device("mps")


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no GPU of Apple here")
def test_apples_gpu_draws(tiny_checkpoint: Path) -> None:
    image = load(tiny_checkpoint, device="mps").text_to_image("red heart")[0]
    assert image.size == (16, 16)
