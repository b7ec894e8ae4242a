"""Every smoke.yaml under configs runs from nothing, by the command in its first line."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/*/smoke.yaml"))


def command(config: Path) -> list[str]:
    """The command that the first line of a configuration gives, "# python -m MODULE ..." """
    first = (ROOT / config).read_text().splitlines()[0]
    words = shlex.split(first.removeprefix("#"))
    launcher = ["accelerate", "launch"]
    if words[: len(launcher)] == launcher:  # one process is what `python -m` starts
        words = ["python", *words[len(launcher) :]]
    assert words[:2] == ["python", "-m"], f"{config}: the first line is no command: {first!r}"
    assert config.as_posix() in words, f"{config}: its command runs another file: {first!r}"
    return [sys.executable, *words[1:]]


@pytest.mark.skipif(not CONFIGS, reason="no configs/*/smoke.yaml in this tree")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_smoke(config: Path, tmp_path: Path) -> None:
    """It starts in an empty folder, where its relative outputs land too."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run(
        command(config),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "config",
    sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/**/*.yaml")) or [None],
    ids=str,
)
def test_every_configuration_starts_with_its_command(config: Path | None) -> None:
    if config is None or config.parts[1] == "accelerate":  # given to `accelerate launch` itself
        pytest.skip("no recipe reads it")
    assert command(config)
