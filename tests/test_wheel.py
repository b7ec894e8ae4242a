"""The wheel: one top-level name, the bundled weights, and it runs outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import mmdlm

pytestmark = pytest.mark.slow  # all of them wait for a build

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "mmdlm" / "checkpoints" / "emoji"
LARGEST = 25e6 + 1e6  # bytes: bundled weights, and the code


def run(*command: str, cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run in a folder outside the checkout, with `site` in front of the installed packages."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(project_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that an old build/ in the checkout cannot slip in."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in project_files:
        copy = folder / "source" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = run(
        *[*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-q"],
        *["--wheel-dir", "dist", "./source"],
        cwd=folder,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "-q", "--target", str(folder)]
    installed = run(*pip, "install", *options, str(wheel), cwd=folder)
    assert installed.returncode == 0, installed.stderr
    return folder


def test_one_top_level_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {"mmdlm", f"mmdlm-{mmdlm.__version__}.dist-info"}


def test_all_of_mmdlm_is_inside(wheel: Path, project_files: list[Path]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("mmdlm/")}
    assert inside == {path.as_posix() for path in project_files if path.parts[0] == "mmdlm"}


def test_size(wheel: Path) -> None:
    assert wheel.stat().st_size <= LARGEST


def test_metadata(wheel: Path) -> None:
    info = f"mmdlm-{mmdlm.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    for requirement in metadata.get_all("Requires-Dist"):
        assert "==" not in requirement.split(";")[0], f"{requirement}: floors only"
        assert "<" not in requirement.split(";")[0], f"{requirement}: floors only"


def test_it_runs_outside_the_checkout(site: Path, tmp_path: Path) -> None:
    where = run(
        sys.executable, "-c", "import mmdlm; print(mmdlm.__file__)", cwd=tmp_path, site=site
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
    for command in ([sys.executable, "-m", "mmdlm.cli"], [str(site / "bin" / "mmdlm")]):
        shown = run(*command, "--help", cwd=tmp_path, site=site)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert all(name in shown.stdout for name in ("draw", "caption", "inpaint", "infill"))


@pytest.mark.skipif(not BUNDLED.is_dir(), reason="no bundled model in this tree")
def test_the_bundled_model_runs_outside_the_checkout(site: Path, tmp_path: Path) -> None:
    filled = run(
        *[sys.executable, "-m", "mmdlm.cli", "infill", "woman [MASK] skin tone"],
        cwd=tmp_path,
        site=site,
    )
    assert filled.returncode == 0, filled.stderr
    assert filled.stdout.startswith("woman ")
