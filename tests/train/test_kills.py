"""Stages and a job killed at random moments and started again: what they leave is bit for bit.

MMDLM_KILLS=100 asks for as many moments over all of them, in place of one each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.shards.shards import write_shard
from data_pipelines.write_shards import png_bytes
from mmdlm.cli.recipe import run
from tests.train.test_pretrain import recipe as pretrain_recipe  # noqa: F401
from tests.train.test_rl import config as rl_recipe  # noqa: F401
from tests.train.test_sft import recipe as sft_recipe  # noqa: F401
from tests.train.test_sft import start  # noqa: F401
from tests.train.tiny import Run

COMMANDS = (
    "train.image_tokenizer",
    "train.pretrain",
    "train.sft",
    "train.rl",
    "data_pipelines.tokenize_images",
)
KILLS = int(os.environ.get("MMDLM_KILLS", len(COMMANDS)))
IN_A_ROW = 3  # moments at which one run is killed, before it may end


def command(module: str, arguments: list[str]) -> None:
    """`python -m MODULE ARGUMENTS`, on a CPU."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    sys.argv = [module, *arguments]
    run(import_module(module).main)


def image_shards(folder: Path) -> Path:
    """Images of noise, in four shards."""
    generator = np.random.default_rng(0)
    for shard in range(4):
        pixels = generator.integers(0, 256, (10, 16, 16, 3)).astype(np.uint8)
        samples = [
            {"__key__": f"{shard}{n}", "png": png_bytes(Image.fromarray(one))}
            for n, one in enumerate(pixels)
        ]
        write_shard(folder / f"{shard:06d}.tar", samples)
    return folder


def options(module: str, request: pytest.FixtureRequest, folder: Path) -> list[str]:
    """Of a tiny run of the command, but for --out."""
    if module == "data_pipelines.tokenize_images":
        tokenizer = request.getfixturevalue("tiny_checkpoint") / "image_tokenizer"
        shards = image_shards(folder / "images")
        return ["--shards", str(shards), "--tokenizer", str(tokenizer), "--batch_size", "2"]
    path = folder / "settings.json"
    if module == "train.image_tokenizer":
        size = {"image_size": 16, "patch": 4, "width": 16, "heads": 2, "levels": [4, 4]}
        config: dict[str, Any] = {
            "images": {"urls": str(image_shards(folder / "images")), "batch_size": 4},
            "model": {"options": {**size, "seam_width": 4}},
            "training": {"max_steps": 12, "save_steps": 3, "sample_steps": 6, "ema": 0.9},
            "threads": 1,
        }
    elif module == "train.rl":
        config = {**request.getfixturevalue("rl_recipe")}
        config["training"] = {**config["training"], "save_steps": 2}
    else:
        config = json.loads(
            request.getfixturevalue(f"{module.rpartition('.')[2]}_recipe").read_text()
        )
    path.write_text(json.dumps(config))
    return ["--config", str(path)]


def kept(out: Path) -> dict[str, bytes]:
    """The final weights, or the shards."""
    paths = [*out.glob("final/**/*.safetensors"), *out.glob("*.tar")]
    assert paths
    assert not list(out.glob("**/*.part"))
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.mark.slow
@pytest.mark.timeout(300 + 30 * KILLS)
@pytest.mark.parametrize("module", COMMANDS)
def test_killed_at_any_moment_nothing_is_lost(
    module: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    given = options(module, request, tmp_path)

    def started(out: Path) -> Run:
        return Run(command, module, [*given, "--out", str(out)], folder=tmp_path)

    def ended(process: Run, out: Path) -> dict[str, bytes]:
        assert process.exit_code() == 0, process.errors.read_text()[-3000:]
        return kept(out)

    Run(time.sleep, 0, folder=tmp_path).exit_code()  # what all are forked from has started
    since = time.monotonic()
    whole = ended(started(tmp_path / "whole"), tmp_path / "whole")
    duration = time.monotonic() - since

    number = COMMANDS.index(module)
    kills = KILLS // len(COMMANDS) + (number < KILLS % len(COMMANDS))
    moments, killed, runs = Random(number), 0, 0
    while killed < kills:
        out = tmp_path / f"killed_{runs}"
        runs += 1
        for _ in range(min(IN_A_ROW, kills - killed)):
            process = started(out)
            process.process.join(moments.uniform(0, duration))
            process.process.kill()
            if process.exit_code() == 0:  # it was the faster one
                break
            assert process.exit_code() == -signal.SIGKILL, process.errors.read_text()[-3000:]
            killed += 1
        assert ended(started(out), out) == whole, out
    print(f"{module}: {killed} kills, {runs} runs, none lost")
