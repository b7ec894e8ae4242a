"""The recipe from the command line: killed, it continues exactly; mistakes are one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from data_pipelines.shards.shards import write_shard
from data_pipelines.sources.source import encode_array
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from tests.train.tiny import Run, logged, pretrain, trajectory
from train.log import LOG
from train.stages.meter import MEASURED

ROOT = Path(__file__).parents[2]
STEPS = 24


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A configuration of a tiny run, without `out`, as JSON, which is YAML, too."""
    generator = np.random.default_rng(0)
    names = ["red heart", "woman dark skin tone", "woman light skin tone", "heart", "skin"]
    for shard in range(2):
        write_shard(
            tmp_path / "codes" / f"{shard}.tar",
            [
                {
                    "__key__": f"{shard}{number:02d}",
                    "txt": names[(shard + number) % len(names)].encode(),
                    "codes.npy": encode_array(generator.integers(0, 25, 16).astype(np.uint16)),
                }
                for number in range(9)
            ],
        )
    config: dict[str, Any] = {
        "data": {
            "sources": [
                {
                    "urls": str(tmp_path / "codes"),
                    "to_sequence": {
                        "class_path": "data_pipelines.sources.image_text.ImageText",
                        "init_args": {
                            "tasks": {"draw": 1, "caption": 1, "joint": 1, "text": 1},
                            "text_slots": 24,
                            "drop_condition": 0.2,
                        },
                    },
                }
            ],
            "batch_size": 3,
            "length": 90,
            "packed": True,
            "shuffle_buffer": 7,
        },
        "model": {
            "shape": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "qk_norm": True,
                "text_slots": 24,
            },
            "text_tokenizer": str(tiny_checkpoint),
            "image_tokenizer": str(tiny_checkpoint / "image_tokenizer"),
        },
        "objective": {
            "process": {
                "class_path": "mmdlm.core.diffusion.forward.Absorbing",
                "init_args": {"schedule": "mmdlm.core.diffusion.schedule.Cosine"},
            },
            "text": {"loss_normalization": "sequence"},
            "times": {
                "class_path": "mmdlm.core.losses.timesteps.StratifiedTimesteps",
                "init_args": {"per": "segment"},
            },
        },
        "training": {
            "max_steps": STEPS,
            "gradient_accumulation_steps": 2,
            "optimizer": {
                "class_path": "train.optimizer.Muon",
                "init_args": {"rest": {"learning_rate": 0.003}},
            },
            "schedule": {
                "class_path": "train.optimizer.WarmupStableDecay",
                "init_args": {"warmup": 3},
            },
            "ema": 0.9,
            "save_steps": 4,
            "logging_steps": 1,
        },
        "threads": 1,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(config))
    return path


def arguments(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["--config", str(recipe), "--out", str(out), *more]


def in_process(recipe: Path, out: Path, *more: str, **options: Any) -> Run:
    return Run(pretrain, arguments(recipe, out, *more), *options.values(), folder=recipe.parent)


def lines(out: Path) -> int:
    return len((out / LOG).read_text().splitlines()) if (out / LOG).exists() else 0


@pytest.mark.slow
def test_a_run_killed_again_and_again_gives_the_same_losses(recipe: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = in_process(recipe, whole)

    # as users start it; killed at any moment after its second checkpoint
    command = [sys.executable, "-m", "train.pretrain", *arguments(recipe, killed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "killed.txt").open("w") as errors:
        first = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=errors)
        while lines(killed) < 9:
            assert first.poll() is None, (tmp_path / "killed.txt").read_text()[-3000:]
            time.sleep(0.002)
        first.kill()
        assert first.wait() == -signal.SIGKILL
    assert lines(killed) < STEPS

    # in the middle of a checkpoint: all of it is written, it has not got its name
    second = in_process(recipe, killed, killed_before="step_00000016")
    assert second.exit_code() == -signal.SIGKILL
    assert (killed / "step_00000016.part" / "model.safetensors").exists()
    assert not (killed / "step_00000016").exists()

    third = in_process(recipe, killed)
    assert third.exit_code() == 0, third.errors.read_text()[-3000:]
    assert reference.exit_code() == 0, reference.errors.read_text()[-3000:]
    assert "continuing from" not in reference.errors.read_text()

    assert [entry["step"] for entry in logged(whole)] == list(range(1, STEPS + 1))
    assert all(set(MEASURED) <= set(entry) for entry in logged(whole))
    assert trajectory(killed) == trajectory(whole)
    assert not list(killed.glob("*.part"))
    one, other = (AutoModel.from_pretrained(out / "final") for out in (whole, killed))
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    states = [torch.load(out / f"step_{STEPS:08d}" / "loader_0.pt") for out in (whole, killed)]
    assert states[0] == states[1]  # the position in the data

    assert one.vocabulary.image_codes == 25
    assert one.config.text_slots == 24
    images = load_image_tokenizer(killed / "final" / "image_tokenizer")
    assert images.codebook_size == 25
    assert (killed / "final" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_it_starts_from_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    """Stored in half precision, trained in float32, its head still tied."""
    out = tmp_path / "first"
    options = ["--training.max_steps", "1", "--model.save_dtype", "float16"]
    tied = ["--model.shape.tie_word_embeddings", "true"]
    run = in_process(recipe, out, *options, *tied)
    assert run.exit_code() == 0, run.errors.read_text()[-3000:]
    stored = load_file(out / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}

    start = ["--model.shape", "null", "--model.start_from", str(out / "final")]
    start += ["--training.max_steps", "1"]
    slow = ["--training.optimizer", "train.optimizer.AdamW"]
    slow += ["--training.optimizer.learning_rate", "1e-9"]
    run = in_process(recipe, tmp_path / "second", *start, *slow)
    assert run.exit_code() == 0, run.errors.read_text()[-3000:]
    trained: MmdlmForMaskedDiffusion = AutoModel.from_pretrained(tmp_path / "second" / "final")
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert trained.lm_head.weight is trained.model.embed_tokens.weight
    for name, tensor in stored.items():
        torch.testing.assert_close(trained.state_dict()[name], tensor.float(), atol=1e-6, rtol=0)


def fails(recipe: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """Status 2 and one sentence, in this process."""
    argv, cpu = sys.argv, torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as status:
            pretrain(arguments(recipe, recipe.parent / "out", *more))
    finally:
        sys.argv = argv
        torch.set_num_threads(cpu)
    assert status.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "Traceback" not in said
    assert said.count("\n") == 0, said
    assert not (recipe.parent / "out").exists()
    return said


@pytest.mark.parametrize(
    "place, key",
    [
        ((), "coefficient"),
        (("training",), "step"),
        (("data",), "batchsize"),
        (("training", "optimizer", "init_args"), "momentun"),
        (("data", "sources", 0, "to_sequence", "init_args"), "slots"),
        (("objective", "process", "init_args"), "eps"),
    ],
)
def test_an_unknown_key(
    place: tuple[Any, ...], key: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads(recipe.read_text())
    inner = config
    for name in place:
        inner = inner[name]
    inner[key] = 1
    recipe.write_text(json.dumps(config))
    assert key in fails(recipe, capsys)


@pytest.mark.parametrize(
    "options, named",
    [
        (["--stesp", "3"], "stesp"),
        (["--training.max_steps", "0"], "steps is 0"),
        (["--training.mixed_precision", "fp16"], "fp16"),
        (["--training.max_steps", "null"], "training.max_steps"),
        (["--training.optimizer", "null"], "training.optimizer"),
        (["--threads", "1000000"], "threads is 1000000"),
        (
            ["--data.packed", "false", "--model.shape.max_position_embeddings", "82"],
            "the 82 positions",
        ),
        (["--model.text_tokenizer", "nowhere"], "nowhere"),
        (["--model.image_tokenizer", "nowhere"], "nowhere"),
        (["--model.shape", "null", "--model.start_from", "nowhere"], "nowhere"),
        (["--model.start_from", "nowhere"], "both are given"),
        (["--model.lora", "{rank: 2}"], "model.lora has no part in train.pretrain"),
        (["--start_from", "nowhere"], "did you mean --model.start_from?"),
        (["--text_tokenizer", "nowhere"], "did you mean --model.text_tokenizer?"),
        (["--model.shape.num_key_value_heads", "3"], "num_key_value_heads 3"),
    ],
)
def test_a_bad_option(
    options: list[str], named: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in fails(recipe, capsys, *options)
