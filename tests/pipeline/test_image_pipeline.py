"""A model is called as a pipeline of diffusers is called, and gives what its tasks give."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmdlm import load
from mmdlm.pipeline.model import Model

FEW = {"num_inference_steps": 3}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    levels = torch.randint(0, 256, (16, 16, 3), generator=rng(), dtype=torch.uint8)
    return Image.fromarray(levels.numpy())


def left_half() -> Image.Image:
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    return mask


def test_a_call_draws_what_its_task_draws(model: Model, image: Image.Image) -> None:
    drawn = model("red heart", generator=rng(1), num_images_per_prompt=2, **FEW).images
    wanted = model.text_to_image("red heart", generator=rng(1), num_images_per_prompt=2, **FEW)
    assert [one.tobytes() for one in drawn] == [one.tobytes() for one in wanted]
    (painted,) = model("red heart", image, left_half(), generator=rng(1), **FEW).images
    inpainted = model.inpaint(image, left_half(), "red heart", generator=rng(1), **FEW)
    assert painted.tobytes() == inpainted.tobytes()
    (varied,) = model("red heart", image, strength=0.5, generator=rng(1), **FEW).images
    again = model.image_to_image(image, "red heart", strength=0.5, generator=rng(1), **FEW)
    assert varied.tobytes() == again.tobytes()


def test_results_come_as_images_arrays_tensors_or_codes(model: Model) -> None:
    options = {"num_images_per_prompt": 2, **FEW}
    pil = model("red heart", **options).images
    array = model("red heart", output_type="np", **options).images
    tensor = model("red heart", output_type="pt", **options).images
    codes = model("red heart", output_type="latent", **options).images
    assert np.array_equal(np.uint8(array * 255 + 0.5), np.stack([np.asarray(one) for one in pil]))
    assert array.shape == (2, 16, 16, 3)
    assert torch.equal(tensor, torch.from_numpy(array).permute(0, 3, 1, 2))
    assert codes.shape == (2, 4, 4)
    decoded = model.decode(codes.flatten(1), (4, 4))
    assert [one.tobytes() for one in decoded] == [one.tobytes() for one in pil]
    (images,) = model("red heart", return_dict=False, **FEW)
    assert images[0].tobytes() == model("red heart", **FEW)[0][0].tobytes()


def test_strength_is_the_share_of_codes_that_are_drawn_again(
    model: Model, image: Image.Image
) -> None:
    def opened(strength: float, mask: Image.Image | None = None) -> int:
        found = []
        model(
            "red heart",
            image,
            mask,
            strength=strength,
            callback_on_step_end=lambda *given: found.append(given),
            callback_on_step_end_tensor_inputs=["committed"],
            num_inference_steps=4,
        )
        repaint = model.repainting(image, mask or everywhere, "red heart", strength=strength)
        assert len(found) == max(1, round(4 * strength))
        return int(repaint.run.batch.target.sum())

    everywhere = Image.new("L", (16, 16), 255)
    assert [opened(share) for share in (1.0, 0.5, 0.25, 0.01)] == [16, 8, 4, 1]
    assert opened(0.5, left_half()) == 4
    (varied,) = model("red heart", image, strength=0.25, **FEW).images
    codes, before = (model.encode([one], "inpaint")[0].ids for one in (varied, image))
    assert varied.tobytes() != image.tobytes()
    assert codes.shape == before.shape


def test_the_callback_sees_each_step(model: Model) -> None:
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, timestep, tensors["latents"].clone(), tensors["committed"].clone()))
        return tensors

    names = ["latents", "committed"]
    result = model(
        "red heart",
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=names,
        output_type="latent",
        **FEW,
    ).images
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert [share for _, share, *_ in seen] == [
        float((~committed).float().mean()) for *_, committed in seen
    ]
    for _, _, latents, committed in seen:
        assert torch.equal(latents == -1, ~committed)
    assert torch.equal(seen[-1][2], result)


def test_a_callback_that_raises_stops(model: Model) -> None:
    class Enough(Exception):
        pass

    def stop(pipe, step, timestep, tensors):
        raise Enough

    with pytest.raises(Enough):
        model("red heart", callback_on_step_end=stop, **FEW)


def test_the_bar_is_as_it_was_set(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(tiny_checkpoint, device="cpu")
    model("red heart", **FEW)
    assert capsys.readouterr().err == ""  # no terminal
    model.set_progress_bar_config(disable=False, desc="heart")
    model("red heart", **FEW)
    assert "heart:" in capsys.readouterr().err
    model.set_progress_bar_config(disable=True)
    model("red heart", **FEW)
    assert capsys.readouterr().err == ""


def test_images_come_in_many_forms(model: Model, image: Image.Image) -> None:
    file = io.BytesIO()
    image.save(file, "PNG")
    levels = np.asarray(image)
    forms = [
        file.getvalue(),
        levels,
        levels.astype(np.float64) / 255,
        torch.from_numpy(levels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1,
        "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
    ]
    wanted = model.caption(image, **FEW)
    assert [model.caption(one, **FEW) for one in forms] == [wanted] * len(forms)
    assert model.caption(np.stack([levels, levels]), **FEW) == [wanted] * 2
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, :8] = 255
    painted = model.inpaint(levels, mask, **FEW)
    assert painted.tobytes() == model.inpaint(image, left_half(), **FEW).tobytes()
    assert painted.tobytes() == model.inpaint(levels, mask > 0, **FEW).tobytes()


@pytest.mark.parametrize(
    "call, message",
    [
        ({"strength": 0.5}, "strength belongs to an image"),
        ({"mask_image": Image.new("L", (16, 16), 255)}, "mask_image belongs to an image"),
        ({"image": "image", "strength": 1.5}, "strength must lie above 0 and at most at 1, got 1"),
        ({"image": "image", "strength": 0}, "strength must lie above 0"),
        ({"image": "image", "height": 32}, "height=32 has no place where an image is given"),
        ({"image": ["image"] * 2, "prompt": ["a"] * 3}, "3 prompts for 2 images"),
        ({"output_type": "pill"}, "output_type 'pill' is not one of .*; did you mean pil"),
        ({"callback_on_step_end_tensor_inputs": ["latent"]}, "'latent'.*did you mean latents"),
        ({"image": "https://example.org/a.png"}, "is a URL; fetch it by mmdlm.load_image"),
        ({"image": np.zeros((16, 16, 3), dtype=np.int64)}, "neither uint8 levels nor floats"),
        ({"image": np.full((16, 16, 3), 7.0)}, "values from 7 to 7; floats of an array lie in"),
        ({"image": np.zeros((3, 16, 16))}, "shape \\[3, 16, 16\\] .* is no image"),
        ({"image": ["image", "wide"], "output_type": "np"}, "16 x 16, 32 x 16 pixels"),
    ],
)
def test_what_does_not_go_together_is_refused(
    model: Model, image: Image.Image, call, message: str
) -> None:
    named = {"image": image, "wide": image.resize((32, 16))}
    if isinstance(call.get("image"), list):
        call = {**call, "image": [named[one] for one in call["image"]]}
    elif isinstance(call.get("image"), str):
        call = {**call, "image": named.get(call["image"], call["image"])}
    with pytest.raises(ValueError, match=message):
        model(**{"prompt": "red heart", **call}, **FEW)


def test_a_misspelt_option_comes_with_the_nearest(model: Model) -> None:
    with pytest.raises(TypeError, match="did you mean num_inference_steps"):
        model("red heart", num_inference_step=3)
