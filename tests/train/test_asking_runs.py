"""A run is asked at each of its steps: the averaged weights of that step, everything else once."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mmdlm
from data_pipelines.shards.shards import write_shard
from data_pipelines.sources.source import encode_array
from eval.provenance import describe_model
from mmdlm.cli import main as cli
from mmdlm.models.checkpoints.run_steps import AVERAGES, BASE, MANIFEST, WEIGHTS
from mmdlm.pipeline.convert import convert
from tests.templates.tiny import transformer, words_of
from tests.train.tiny import Run, pretrain, sft
from train.saving import setup_of

OBJECTIVE = {
    "process": {
        "class_path": "mmdlm.core.diffusion.forward.Absorbing",
        "init_args": {"schedule": "mmdlm.core.diffusion.schedule.Linear"},
    }
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Four steps of pretraining on images and texts, with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("recipe")
    codes = np.random.default_rng(0).integers(0, 25, (4, 16)).astype(np.uint16)
    write_shard(
        folder / "codes" / "0.tar",
        [
            {"__key__": f"{n}", "txt": b"red heart", "codes.npy": encode_array(one)}
            for n, one in enumerate(codes)
        ],
    )
    source = {
        "urls": str(folder / "codes"),
        "to_sequence": {
            "class_path": "data_pipelines.sources.image_text.ImageText",
            "init_args": {"text_slots": 16},
        },
    }
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config: dict[str, Any] = {
        "data": {"sources": [source], "batch_size": 2, "length": 34},
        "model": {
            "shape": {**shape, "num_attention_heads": 2, "text_slots": 16},
            "text_tokenizer": str(tiny_checkpoint),
            "image_tokenizer": str(tiny_checkpoint / "image_tokenizer"),
        },
        "objective": OBJECTIVE,
        "training": {"max_steps": 4, "ema": 0.5, "save_steps": 2, "logging_steps": 1},
        "generation_config": {"text_to_image": {"num_inference_steps": 3}},
        "threads": 1,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(config))
    return path


def train(recipe: Path, out: Path, *more: str, killed_before: str | None = None) -> Path:
    arguments = ["--config", str(recipe), "--out", str(out), *more]
    run = Run(pretrain, arguments, killed_before, folder=out.parent)
    code = -signal.SIGKILL if killed_before else 0
    assert run.exit_code() == code, run.errors.read_text()[-3000:]
    return out


@pytest.fixture(scope="module")
def going_on(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed just before its final weights had their name."""
    return train(recipe, tmp_path_factory.mktemp("runs") / "mine", killed_before="final")


@pytest.fixture
def mine(going_on: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(going_on, tmp_path / "mine"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(mmdlm.load(folder, device="cpu").denoiser.state_dict())


@pytest.mark.slow
def test_each_step_answers_with_its_averages(
    going_on: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest one where the run is named; from a shell and in Python."""
    for name, number in (("", 4), ("step_2", 2), ("step_00000004", 4)):
        step = going_on / f"step_{number:08d}"
        found = weights(going_on / name)
        said = capsys.readouterr().err
        assert said == f"answering from {step} (averaged weights of step {number})\n"
        averages = load_file(step / AVERAGES)
        assert {f"denoiser.{key}" for key in found} == set(averages)
        for key, tensor in found.items():
            assert torch.equal(tensor, averages[f"denoiser.{key}"]), key
    out = tmp_path / "out.png"
    drawn = ["draw", "red heart", "-o", str(out), "--model", str(going_on / "step_2")]
    assert cli.main(drawn) == 0
    assert out.stat().st_size
    assert "(averaged weights of step 2)" in capsys.readouterr().err
    assert mmdlm.load(going_on).defaults.text_to_image.num_inference_steps == 3  # of the recipe
    assert not list(going_on.glob("step_*/image_tokenizer"))  # it is there once


@pytest.mark.slow
def test_a_finished_run_answers_with_its_final_weights(
    mine: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which are those of its last step; asked for by name, nothing needs to be said."""
    train(recipe, mine)
    capsys.readouterr()
    found = weights(mine)
    said = f"answering from {mine / 'final'}, the weights of the finished run\n"
    assert capsys.readouterr().err == said
    images = mine.with_name("images")  # as train.own_images has it
    images.mkdir()
    (images / "model").symlink_to(mine)
    weights(images)
    assert capsys.readouterr().err == said.replace(str(mine), str(images / "model"))
    last = weights(mine / "step_4")
    capsys.readouterr()
    for key, tensor in weights(mine / "final").items():
        assert torch.equal(tensor, found[key])
        assert torch.equal(tensor, last[key])
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_run_without_averages_answers_with_its_weights(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(recipe, tmp_path / "mine", "--training.ema", "0", killed_before="final")
    capsys.readouterr()
    found = weights(out)
    step = out / "step_00000004"
    assert f"answering from {step} (weights without an average of step 4)" in (
        capsys.readouterr().err
    )
    for key, tensor in load_file(step / WEIGHTS).items():
        assert torch.equal(found[key.removeprefix("denoiser.")], tensor)


@pytest.mark.slow
def test_a_step_is_saved_and_trained_on(going_on: Path, recipe: Path, tmp_path: Path) -> None:
    found = weights(going_on / "step_2")
    mmdlm.load(going_on / "step_2").save_pretrained(tmp_path / "saved")
    for key, tensor in weights(tmp_path / "saved").items():
        assert torch.equal(tensor, found[key])
    slow = ["--training.optimizer", "train.optimizer.AdamW", "--training.max_steps", "1"]
    slow += ["--training.optimizer.learning_rate", "1e-12"]
    start = ["--model.shape", "null", "--model.start_from", str(going_on / "step_2")]
    out = train(recipe, tmp_path / "more", *start, *slow)
    for key, tensor in weights(out).items():
        torch.testing.assert_close(tensor, found[key], atol=1e-6, rtol=0)
    assert mmdlm.load(out).defaults.text_to_image.num_inference_steps == 3


def fails(model: Path, capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """One sentence and status 2."""
    capsys.readouterr()
    assert cli.main([*(command or ("infill", "a [MASK]")), "--model", str(model)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0, said
    return said


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("file", [WEIGHTS, AVERAGES, MANIFEST])
@pytest.mark.parametrize("damage", [empty, flip, Path.unlink], ids=lambda one: one.__name__)
def test_damage_is_named_and_the_step_before_is_offered(
    file: str, damage: Any, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the step is named or stands for its run."""
    damage(mine / "step_00000004" / file)
    for model in (mine, mine / "step_4"):
        said = fails(model, capsys)
        assert f"{mine / 'step_00000004'} is damaged ({file}" in said or file == MANIFEST, said
        assert said.endswith(f"ask {mine / 'step_00000002'}, which is intact, in its place"), said
    assert weights(mine / "step_2")
    empty(mine / "step_00000002" / WEIGHTS)
    assert fails(mine, capsys).endswith("no step before it is intact")


def test_a_file_that_the_manifest_leaves_out(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody took it out of the list, so that nothing would be compared with it."""
    listed = mine / "step_00000004" / MANIFEST
    entries = json.loads(listed.read_text())
    del entries[AVERAGES]
    listed.write_text(json.dumps(entries))
    assert f"is damaged ({AVERAGES} is not in its {MANIFEST})" in fails(mine, capsys)


def test_what_is_half_written_or_not_there(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one sentence; `mmdlm convert` says how a step becomes a folder."""
    (mine / "step_00000004").rename(mine / "step_00000004.part")
    said = fails(mine / "step_00000004.part", capsys)
    assert "step_00000004.part is not complete" in said
    assert f"ask {mine / 'step_00000002'}" in said
    assert f"{mine} has no step_7; it has step_00000002" in fails(mine / "step_7", capsys)
    convert = ["convert", str(mine), str(mine.parent / "converted")]
    assert cli.main(convert) == 2
    assert "save_pretrained(FOLDER)" in capsys.readouterr().err
    shutil.rmtree(mine / "setup")
    assert f"{mine} has no setup/config.json" in fails(mine, capsys)


def test_a_run_without_a_step_yet(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in mine.glob("step_*"):
        shutil.rmtree(path)
    assert "is a run without a checkpoint yet" in fails(mine, capsys)


def test_a_run_that_cannot_go_on_keeps_its_setup(mine: Path, recipe: Path) -> None:
    before = (mine / "setup" / "config.json").read_bytes()
    wider = ["--config", str(recipe), "--out", str(mine), "--model.shape.hidden_size", "32"]
    run = Run(pretrain, wider, folder=mine.parent)
    assert run.exit_code() == 2
    assert (mine / "setup" / "config.json").read_bytes() == before


def test_a_report_is_about_what_was_read(mine: Path, going_on: Path) -> None:
    """While the run goes on, it has a newer step, and has dropped the one that answered."""
    model = mmdlm.load(mine, device="cpu")
    (mine / "step_00000004").rename(mine / "step_00000006")
    described = describe_model(str(mine), model)
    averages = (going_on / "step_00000004" / AVERAGES).read_bytes()
    assert described["step"] == 4
    assert described["name"] == str(mine)
    assert described["sha256"][AVERAGES] == hashlib.sha256(averages).hexdigest()
    assert "setup/image_tokenizer/model.safetensors" in described["sha256"]


# ---- weights that a step does not hold ----------------------------------------------------------


@pytest.mark.slow
def test_shards_of_several_processes_are_refused_with_what_helps(
    mine: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = mine / "step_00000004"
    (step / "sharded").mkdir()
    said = fails(mine, capsys)
    assert "in shards of several processes (FSDP)" in said
    assert f"with --training.max_steps 4, which ends it there, then ask {mine / 'final'}" in said
    (step / "sharded").rmdir()
    train(recipe, mine, "--training.max_steps", "4")
    assert weights(mine / "final")


@pytest.fixture(scope="module")
def adapting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of low rank for a model of LLaDA's names: start, recipe.yaml and a killed run."""
    folder = tmp_path_factory.mktemp("adapting")
    words = words_of("llada")
    transformer(words.vocabulary).float().save_pretrained(folder / "start")
    list(convert(folder / "start", folder / "theirs", to="llada"))
    words.tokenizer.save_pretrained(folder / "theirs")
    talk = {"prompt": "hi", "completion": "yes"}
    samples = [{"__key__": str(n), "json": json.dumps(talk).encode()} for n in range(4)]
    write_shard(folder / "talks" / "0.tar", samples)
    source = {
        "urls": str(folder / "talks"),
        "to_sequence": {
            "class_path": "data_pipelines.sources.conversations.Conversation",
            "init_args": {"answers": "last", "tail": "data_pipelines.sources.end_of_text.NoTail"},
        },
    }
    config: dict[str, Any] = {
        "model": {
            "start_from": str(folder / "theirs"),
            "lora": {"rank": 2, "alpha": 8, "targets": ["q_proj", "down_proj"]},
        },
        "data": {"sources": [source], "batch_size": 2, "length": 64},
        "objective": OBJECTIVE,
        "training": {
            "max_steps": 4,
            "ema": 0.5,
            "save_steps": 2,
            "optimizer": {
                "class_path": "train.optimizer.AdamW",
                "init_args": {"learning_rate": 0.1},
            },
        },
        "threads": 1,
    }
    (folder / "recipe.yaml").write_text(json.dumps(config))
    arguments = ["--config", str(folder / "recipe.yaml"), "--out", str(folder / "mine")]
    run = Run(sft, arguments, "final", folder=folder)
    assert run.exit_code() == -signal.SIGKILL, run.errors.read_text()[-3000:]
    return folder


@pytest.mark.slow
def test_matrices_of_low_rank_are_added_to_the_model_they_started_from(adapting: Path) -> None:
    """As the end of the run adds them; its frozen weights lie under published names."""
    run = adapting / "mine"
    last, before = weights(run), weights(adapting / "theirs")
    halfway = weights(run / "step_2")
    arguments = ["--config", str(adapting / "recipe.yaml"), "--out", str(run)]
    assert Run(sft, arguments, folder=adapting).exit_code() == 0
    final = weights(run / "final")
    for key, tensor in final.items():
        moved = key.endswith(("q_proj.weight", "down_proj.weight"))
        assert torch.equal(tensor, last[key]), key
        assert torch.equal(tensor, before[key]) != moved, key
        assert torch.equal(tensor, halfway[key]) != moved, key
    half = mmdlm.load(run / "step_4", dtype=torch.bfloat16, device="cpu").denoiser.state_dict()
    for key, tensor in final.items():
        assert torch.equal(half[key], tensor.bfloat16()), key


def test_another_model_in_the_place_of_the_start_is_noticed(
    adapting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(adapting / "mine", tmp_path / "mine"))
    other = Path(shutil.copytree(adapting / "theirs", tmp_path / "theirs"))
    base = json.loads((run / "setup" / BASE).read_text())
    base |= {"name": "theirs", "folder": str(other)}
    (run / "setup" / BASE).write_text(json.dumps(base))
    assert weights(run / "step_2")  # elsewhere, and the same
    stored = load_file(other / WEIGHTS)
    norms = [name for name in stored if name.endswith("norm.weight")]
    stored[norms[0]] += 1
    save_file(stored, other / WEIGHTS, metadata={"format": "pt"})
    assert "holds other weights by now" in fails(run / "step_2", capsys)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (other / "config.json").write_text(json.dumps(config))
    said = fails(run / "step_2", capsys)
    assert f"ask --model theirs with --adapter {run / 'adapter'}" in said
    shutil.rmtree(other)
    said = fails(run / "step_2", capsys)
    assert f"those of 'theirs', which is not at {other}" in said
    (run / "setup" / BASE).write_text("[]")
    assert "does not describe a model" in fails(run / "step_2", capsys)


def test_frozen_weights_that_are_nowhere_else_are_named(
    going_on: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as those of a tower that was read from a folder of its own, or drawn at random."""
    run = Path(shutil.copytree(going_on, tmp_path / "mine"))
    model = mmdlm.load(run)
    model.denoiser.lm_head.requires_grad_(False)
    shutil.rmtree(run / "setup")
    (run / "setup").mkdir()
    setup_of(model.denoiser, model.text_tokenizer, None)(run / "setup")
    said = fails(run, capsys)
    assert "leaves out weights that were not trained (lm_head.weight ...)" in said
    assert "--training.max_steps 4" in said
