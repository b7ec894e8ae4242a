"""The recipes of `make rl` from nothing to a score, cut to a few steps."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines import countdown, sudoku, text_tokenizer, write_shards
from eval.run import TASKS
from mmdlm.cli.recipe import run
from tests.train.rewarding import assert_learned
from tests.train.tiny import logged
from train import rl, sft

ROOT = Path(__file__).parents[2]
METHODS = ("diffu_grpo", "unigrpo", "coupled", "trace", "wd1")
# A model of three steps is never right: beside the recipe's rewards stands one that tells any two
# answers apart, and by which the recipe's filter keeps them.
SPREAD = (
    "--reward_config.rubric.rewards.checksum tests.train.rewarding.Checksum "
    "--reward_config.right checksum"
)
TINY = (
    "--model.shape.hidden_size 16 --model.shape.intermediate_size 32 "
    "--model.shape.num_hidden_layers 1"
)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch):
    """Runs a recipe in this process, as `python -m` would."""

    def call(main, line: str) -> None:
        monkeypatch.setattr(sys, "argv", ["recipe", *shlex.split(line)])
        run(main)

    return call


@pytest.fixture
def learned(shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Folder of the SFT model of a task, made as the Makefile makes it."""

    def make(task: str, file: str, prompt: str, completion: str, size: int) -> Path:
        for name in ("configs", "mmdlm"):
            (tmp_path / name).symlink_to(ROOT / name)
        monkeypatch.chdir(tmp_path)
        base = Path("runs") / task
        job = {"sudoku": sudoku, "countdown": countdown}[task]
        shell(job.main, f"--out {base / file} --count 40")
        shell(
            {"conversations": write_shards.conversations},
            f"conversations --source {base / file} --out {base / 'shards'} --prompt {prompt!r} "
            f"--completion {completion!r}",
        )
        words = base / "text_tokenizer"
        shell(
            text_tokenizer.main,
            f"--shards {base / 'shards'} --out {words} --size {size} --space_before false",
        )
        # Of 40 problems a tokenizer does not learn each number as a token of its own.
        steps = "--training.max_steps 3 --data.batch_size 4 --data.length 40"
        shell(sft.main, f"--config configs/sft/{task}.yaml {TINY} {steps}")
        return base

    return make


@pytest.mark.slow
def test_sudoku(shell, learned) -> None:
    base = learned("sudoku", "puzzles.csv", "Puzzle", "Solution", 257)
    few = "--prompts.init_args.count 20 --prompts_per_batch 2 --num_generations 2"
    few = f"{few} --training.max_steps 2 {SPREAD}"
    shell(rl.main, f"--config configs/rl/sudoku.yaml {few} --out {base / 'rl_0'}")
    assert_learned(logged(base / "rl_0"), ("cells", "grid", "checksum"))
    for method in METHODS:
        on_top = f"--config configs/rl/sudoku_methods.yaml --config configs/rl/sudoku_{method}.yaml"
        out = base / f"{method}_0"
        shell(rl.main, f"--config configs/rl/sudoku.yaml {on_top} {few} --out {out}")
        assert [line["step"] for line in logged(out)] == [1, 2]
        assert_learned(logged(out), ("cells", "grid", "checksum"))
    few = f"--count 5 --out {base / 'eval' / 'rl_0.json'}"
    shell(TASKS["sudoku"], f"--config configs/eval/sudoku.yaml --model {base / 'rl_0/final'} {few}")
    report = json.loads((base / "eval" / "rl_0.json").read_text())
    assert 0 <= report["results"]["measures"]["grid"]["value"] <= 1
    assert (
        report["settings"]["generation_config"]["complete"]["num_inference_steps"] == 1
    )  # of the SFT


def test_countdown(shell, learned) -> None:
    base = learned("countdown", "problems.jsonl", "{input}->{output}", "solution", 300)
    few = f"--prompts_per_batch 2 --num_generations 2 --training.max_steps 2 {SPREAD}"
    shell(rl.main, f"--config configs/rl/countdown.yaml {few} --out {base / 'rl_0'}")
    assert [line["step"] for line in logged(base / "rl_0")] == [1, 2]
    assert_learned(logged(base / "rl_0"), ("right", "checksum"))
    few = f"--count 5 --out {base / 'eval' / 'rl_0.json'}"
    shell(
        TASKS["countdown"],
        f"--config configs/eval/countdown.yaml --model {base / 'rl_0/final'} {few}",
    )
    report = json.loads((base / "eval" / "rl_0.json").read_text())
    assert 0 <= report["results"]["measures"]["right"]["value"] <= 1


@pytest.mark.slow
def test_emoji(shell, tmp_path: Path) -> None:
    few = "--prompts_per_batch 2 --num_generations 2 --training.max_steps 2"
    here = "--prompts.init_args.urls tests/data/emoji_codes.tar"
    shell(
        rl.main,
        f"--config configs/rl/emoji.yaml {few} {here} --gallery.urls tests/data/emoji_images.tar "
        f"--out {tmp_path / 'rl_0'}",
    )
    assert [line["step"] for line in logged(tmp_path / "rl_0")] == [1, 2]
    assert_learned(logged(tmp_path / "rl_0"), ("nearest",))


def test_make_knows_every_run_of_the_report() -> None:
    """What eval.reinforcement compares is what `make rl` makes, by the configs that there are."""
    import yaml

    planned = subprocess.run(
        ["make", "-nB", "rl"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for word in shlex.split(planned):
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), word
    report = yaml.safe_load((ROOT / "configs" / "eval" / "reinforcement.yaml").read_text())
    for one in report["comparisons"]:
        for seed in one.get("seeds", (0, 1, 2)):
            for when in ("before", "after"):
                assert one[when].replace("{seed}", str(seed)) in planned, one["name"]
