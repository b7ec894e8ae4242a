"""With offloading, what computes is on the device and everything else is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmdlm import load
from mmdlm.pipeline import model as model_file
from mmdlm.pipeline.model import Model
from mmdlm.pipeline.offload import Offload

GPU = torch.device("cuda:0")


@pytest.fixture
def model(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model with offloading, whose moves are written down: there need be no GPU."""
    model = load(tiny_checkpoint, device="cpu")
    where: dict[int, torch.device] = {}
    monkeypatch.setattr(
        Offload, "move", lambda self, module, device: where.update({id(module): device})
    )
    parts = {"denoiser": model.denoiser, "tokenizer": model.image_tokenizer}

    def watch(part: str, name: str) -> None:
        kind = type(parts[part])
        whole = getattr(kind, name)

        def computes(self, *args, **kwargs):
            others = [id(one) for one in parts.values() if one is not self]
            assert where.get(id(self)) == GPU, f"{part}.{name} is not on the device"
            assert all(where.get(one) != GPU for one in others), "something else is as well"
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, computes)

    for part, name in (
        ("denoiser", "hidden"),
        ("denoiser", "logits_at"),
        ("tokenizer", "encode"),
        ("tokenizer", "decode"),
    ):
        watch(part, name)
    monkeypatch.setattr(model_file, "device_named", lambda _: GPU)
    model.enable_model_cpu_offload()
    assert model.device == GPU
    object.__setattr__(model, "device", torch.device("cpu"))  # where the tensors really are
    return model


def test_what_computes_is_on_the_device(model: Model) -> None:
    image = model.text_to_image("red heart", num_inference_steps=2)[0]
    assert len(list(model.draw_trajectory("red heart", num_inference_steps=2))) == 2
    assert isinstance(model.caption(image, num_inference_steps=2), str)
    model.inpaint(image, torch.ones(16, 16, dtype=torch.bool), num_inference_steps=2)
    assert model("red heart", image, num_inference_steps=2).images
    assert model.complete("red", max_new_tokens=2)
    assert model.loglikelihood([("red", " heart")])[0].tokens == 1
    model.text_network(torch.tensor([model.codec.encode("red heart")]))


def test_moving_a_model_ends_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_file, "device_named", torch.device)
    model.to("cpu")
    assert model.runner is None


def test_without_a_gpu_there_is_nothing_to_keep_free(tiny_checkpoint: Path) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match="there is no GPU here to keep free"):
        load(tiny_checkpoint, device="cpu").enable_model_cpu_offload()


@pytest.mark.gpu
def test_a_gpu_holds_one_part_at_a_time(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, device="cpu")
    wanted = model.text_to_image("red heart", num_inference_steps=2)[0]
    model.enable_model_cpu_offload("cuda")
    assert model.text_to_image("red heart", num_inference_steps=2)[0].size == wanted.size
    assert next(model.denoiser.parameters()).device.type == "cpu"
    assert next(model.image_tokenizer.parameters()).device.type == "cuda"
