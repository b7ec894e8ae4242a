"""Training a model that sees: it learns what is in the images, and goes on exactly."""

from __future__ import annotations

import json
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

import mmdlm
from data_pipelines import extract_features
from data_pipelines.shards.shards import read_shard
from data_pipelines.sources.vision_samples import Eye, SeenCaption, Through
from mmdlm.core.diffusion.forward import Absorbing, Corruption
from mmdlm.core.diffusion.schedule import Linear
from mmdlm.core.losses.objective import Objective
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sequence import Sequence, collate, image_segment
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.vision.image_files import open_image
from tests.data_pipelines.tiny_vision import plain
from tests.models.tiny import VOCABULARY, document
from tests.train.test_parts import part_of, seeing
from tests.train.tiny import Run, pretrain, trajectory
from train.stages.denoising import Coefficients, DenoisingStage
from train.stages.param_groups import Parts

ROOT = Path(__file__).parents[2]
IMAGES = str(ROOT / "tests/data/emoji_images.tar")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """configs/pretrain/see.yaml with paths that hold from any folder."""
    config = yaml.safe_load((ROOT / "configs/pretrain/see.yaml").read_text())
    del config["out"]
    words = ROOT / config["model"]["text_tokenizer"]
    config["model"]["text_tokenizer"] = str(words)
    config["data"]["sources"][0]["urls"] = IMAGES
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(config | {"threads": 1}))
    return path


def changed(recipe: Path, name: str, **options: Any) -> Path:
    """The recipe with other values, by dotted names with __ for dots."""
    config = json.loads(recipe.read_text())
    for place, value in options.items():
        *outer, last = place.split("__")
        inner = config
        for part in outer:
            inner = inner[part]
        inner[last] = value
    path = recipe.with_name(name)
    path.write_text(json.dumps(config))
    return path


def train(recipe: Path, out: Path, *more: str) -> None:
    done = Run(pretrain, ["--config", str(recipe), "--out", str(out), *more], folder=recipe.parent)
    assert done.exit_code() == 0, done.errors.read_text()[-3000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(MmdlmForMaskedDiffusion.from_pretrained(folder).state_dict())


BLIND: dict[str, Any] = {"model__vision": None, "model__parts": {}}
SHORT: dict[str, Any] = {
    "training__max_steps": 6,
    "training__save_steps": 2,
    "training__logging_steps": 1,
    "training__ema": 0.0,
    "data__batch_size": 4,
}


@pytest.mark.slow
def test_it_learns_what_is_in_the_images(recipe: Path, tmp_path: Path) -> None:
    """Sixteen captions by heart; shown another image, it says that one's caption."""
    train(recipe, tmp_path / "out")
    model = MmdlmForMaskedDiffusion.from_pretrained(tmp_path / "out" / "final").eval()
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out" / "final")
    samples = list(read_shard(IMAGES))
    source = Through(SeenCaption(16), Eye(model.vision.config.tiling))
    batch = collate(
        (
            source(one, model.vocabulary, tokenizer=words, generator=torch.Generator())
            for one in samples
        ),
        model.vocabulary,
    )
    names = [one["txt"].decode() for one in samples]
    assert batch.views is not None
    for turned in (0, 5):
        views = batch.views[turned:] + batch.views[:turned]
        with torch.no_grad():
            seen = model.see(replace(batch, views=views))
            out = Sampler(steps=16)(model, seen, generator=torch.Generator().manual_seed(0))
        said = [
            words.decode(ids[target], skip_special_tokens=True).strip()
            for ids, target in zip(out.ids, batch.target, strict=True)
        ]
        right = map(str.__eq__, said, names[turned:] + names[:turned])
        assert sum(right) >= 15

    # as users ask for it
    images = [open_image(one["png"]) for one in samples]
    loaded = mmdlm.load(tmp_path / "out" / "final")
    assert sum(map(str.__eq__, loaded.caption(images), names)) >= 15
    generation_config = loaded.defaults.caption  # as the recipe records it
    assert (generation_config.order, generation_config.min_new_tokens) == ("left_to_right", 1)
    sheets = sorted(path.name for path in (tmp_path / "out" / "samples").iterdir())
    assert sheets == [f"step_{step:08d}.png" for step in (0, 100, 200, 300)]


@pytest.mark.slow
def test_a_run_that_is_killed_continues_exactly(recipe: Path, tmp_path: Path) -> None:
    """With rates of their own, and images in every batch."""
    short = changed(recipe, "short.yaml", **SHORT)
    train(short, tmp_path / "whole")
    command = ["--config", str(short), "--out", str(tmp_path / "killed")]
    first = Run(pretrain, command, "step_00000004", folder=tmp_path)
    assert first.exit_code() == -signal.SIGKILL
    train(short, tmp_path / "killed")
    assert trajectory(tmp_path / "killed") == trajectory(tmp_path / "whole")
    one, other = (weights(tmp_path / name / "final") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_features_train_as_images_do(recipe: Path, tmp_path: Path) -> None:
    """From a tower that is frozen: the same losses, and the tower stays to the last bit."""
    train(changed(recipe, "short.yaml", **SHORT), tmp_path / "first")
    start = tmp_path / "first" / "final"
    extract_features.main(IMAGES, tmp_path / "features", model=start, dtype="float32")
    projector = {
        "model__shape": None,
        "model__vision": None,
        "model__start_from": str(start),
        "model__parts": {"frozen": ["vision_tower", "denoiser"]},
        **SHORT,
    }
    from_images = changed(recipe, "images.yaml", **projector)
    train(from_images, tmp_path / "images")
    source = json.loads(recipe.read_text())["data"]["sources"][0]
    sources = [{**source, "urls": str(tmp_path / "features")}]
    from_features = changed(from_images, "features.yaml", data__sources=sources)
    train(from_features, tmp_path / "by_features")

    losses = [
        torch.tensor([json.loads(line)["loss/text"] for line in trajectory(tmp_path / name)])
        for name in ("images", "by_features")
    ]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    before, after = weights(start), weights(tmp_path / "by_features" / "final")
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (part_of(name) != "projector"), name

    said = fails(changed(from_features, "bad.yaml", model__parts={}), tmp_path)
    assert "holds features, through which the tower cannot learn; freeze vision_tower" in said


@pytest.mark.slow
def test_the_tower_of_a_text_model_is_read(recipe: Path, tmp_path: Path) -> None:
    """A language model gets a vision adapter, of which only the projector is trained."""
    config = json.loads(recipe.read_text())
    text = {
        "model__vision": None,
        "model__parts": {},
        "data__sources": [
            {
                "urls": IMAGES,
                "to_sequence": {
                    "class_path": "data_pipelines.sources.text.Text",
                    "init_args": {"max_tokens": 16},
                },
            }
        ],
        **SHORT,
    }
    train(changed(recipe, "text.yaml", **text), tmp_path / "text")
    train(changed(recipe, "short.yaml", **SHORT), tmp_path / "other")
    tower = tmp_path / "tower"
    stored = weights(tmp_path / "other" / "final")
    tower.mkdir()
    prefix = "vision.tower."
    save_file(
        {n.removeprefix(prefix): v for n, v in stored.items() if n.startswith(prefix)},
        tower / "model.safetensors",
    )
    begin = {
        "model__shape": None,
        "model__vision": config["model"]["vision"],
        "model__start_from": str(tmp_path / "text" / "final"),
        "model__vision_tower_weights": str(tower),
        "model__parts": {"frozen": ["vision_tower", "denoiser"]},
        **SHORT,
    }
    train(changed(recipe, "begin.yaml", **begin), tmp_path / "seeing")
    trained, words = weights(tmp_path / "seeing" / "final"), weights(tmp_path / "text" / "final")
    for name, value in trained.items():
        if name.startswith(prefix):
            assert torch.equal(value, stored[name]), name
        elif not name.startswith("vision."):
            assert torch.equal(value, words[name]), name

    again = {**begin, "model__start_from": str(tmp_path / "seeing" / "final")}
    assert "sees already" in fails(changed(recipe, "again.yaml", **again), tmp_path)


def fails(recipe: Path, folder: Path) -> str:
    """Status 2 and one sentence."""
    out = folder / "out_of_a_mistake"
    done = Run(pretrain, ["--config", str(recipe), "--out", str(out)], folder=folder)
    assert done.exit_code() == 2
    said = done.errors.read_text().splitlines()[-1]
    assert said.startswith("error: ")
    assert not out.exists()
    return said


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model__vision": None}, "vision_tower is named, but this model has none"),
        ({**BLIND}, "SeenCaption needs a model that sees"),
        ({**BLIND, "model__vision_tower_weights": "x"}, "no model.vision that they are for"),
        ({"model__vision_tower_weights": "nowhere"}, "tower weights nowhere: no safetensors"),
        ({"model__vision__tiling__init_args__grid": 3}, "grid 3"),
    ],
)
def test_mistakes_are_one_sentence(
    options: dict[str, Any], message: str, recipe: Path, tmp_path: Path
) -> None:
    assert message in fails(changed(recipe, "bad.yaml", **options), tmp_path)


def test_without_images_every_parameter_has_a_gradient_of_zero() -> None:
    """So that a process without images does not keep waiting one that has some."""
    model = seeing()
    objective = Objective(process=Absorbing(schedule=Linear()))
    stage = DenoisingStage(model, objective, Coefficients(), parts=Parts(vision_tower_lr=1e-3))
    batch = collate([document(5, 0, seed=0)], VOCABULARY)
    noise = stage.draw(batch, generator=torch.Generator().manual_seed(0))
    sum(stage(batch, noise).values()).backward()
    idle = {id(parameter) for parameter in model.vision.tower.idle_parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in idle:
            assert parameter.grad is None
        elif part_of(name) != "denoiser":
            assert parameter.grad is not None, name
            assert not parameter.grad.any()
    assert set(stage.rates()) == set(model.vision.tower.parameters())


def test_complementary_masks_look_at_a_image_once() -> None:
    """Both copies read the same features, whose gradient is the sum of what each has to say."""
    model = seeing()
    objective = Objective(process=Absorbing(schedule=Linear()), complementary=True)
    stage = DenoisingStage(model, objective, Coefficients())
    views = model.vision.config.tiling.views([open_image(plain(red)) for red in (40, 90)])
    batch = collate(
        [
            Sequence((image_segment(one, VOCABULARY), *document(5, 0, seed=n).segments))
            for n, one in enumerate(views)
        ],
        VOCABULARY,
    )
    looks = []
    model.vision.tower.register_forward_hook(lambda *_: looks.append(1))
    noise = stage.draw(batch, generator=torch.Generator().manual_seed(0))
    sums = stage(batch, noise)
    assert len(looks) == 1
    assert len(noise.corruption.x_t) == 2 * len(batch)
    (found,) = torch.autograd.grad(sums["text"], [next(model.vision.projector.parameters())])

    def alone(rows: slice) -> torch.Tensor:
        whole = {f.name: getattr(noise.corruption, f.name) for f in fields(Corruption)}
        given = {name: value for name, value in whole.items() if value is not None}
        part = Corruption(**{name: value[rows] for name, value in given.items()})
        one = replace(objective, complementary=False).terms(model, model.see(batch), part)
        weight = next(model.vision.projector.parameters())
        return torch.autograd.grad(one.sums["text"], [weight])[0]

    torch.testing.assert_close(found, alone(slice(0, 2)) + alone(slice(2, 4)))
    assert bool(found.any())
