"""Every smoke*.yaml under configs runs from nothing.

The recipe of configs/NAME/smoke*.yaml is train.NAME, unless a comment at its top gives another
command: "# python -m eval.emoji --config configs/eval/smoke.yaml".
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.train.rewarding import assert_learned
from tests.train.tiny import logged

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/*/smoke*.yaml"))


def command(config: Path) -> list[str]:
    """The command that a configuration is for."""
    for line in (ROOT / config).read_text().splitlines():
        if not line.startswith("#"):
            break
        words = shlex.split(line.removeprefix("#"))
        if words[:2] == ["python", "-m"]:
            assert config.as_posix() in words, f"{config}: its command runs another file: {line!r}"
            return [sys.executable, *words[1:]]
    return [sys.executable, "-m", f"train.{config.parent.name}", "--config", config.as_posix()]


@pytest.mark.slow
@pytest.mark.skipif(not CONFIGS, reason="no configs/*/smoke*.yaml in this tree")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_smoke(config: Path, tmp_path: Path) -> None:
    """It starts in an empty folder, where its relative outputs land too."""
    for name in ("configs", "mmdlm", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        command(config),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    recipe = yaml.safe_load((ROOT / config).read_text())
    if "reward_config" in recipe:  # a run of train.rl ends well where every reward raises, too
        assert_learned(
            logged(tmp_path / recipe["out"]), recipe["reward_config"]["rubric"]["rewards"]
        )


def test_a_comment_at_the_top_names_another_command(tmp_path: Path) -> None:
    config = tmp_path / "sft" / "smoke.yaml"
    config.parent.mkdir()
    config.write_text(f"# A run in seconds.\n# python -m eval.emoji --config {config}\nlimit: 3\n")
    assert command(config)[1:3] == ["-m", "eval.emoji"]
    config.write_text("# A run in seconds.\nsteps: 3\n")
    assert command(config)[1:] == ["-m", "train.sft", "--config", config.as_posix()]
