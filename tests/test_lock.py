"""requirements.lock pins what pyproject.toml asks for, and nothing of the machine it is made on."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def locked() -> dict[str, list[Requirement]]:
    """The lines of the lock by name; a package may have several, for different Pythons."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    found = defaultdict(list)
    for line in lines:
        if not line.startswith("#"):
            requirement = Requirement(line)
            found[canonicalize_name(requirement.name)].append(requirement)
    return found


def wanted() -> list[Requirement]:
    """What the package and all of its extras ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(one) for group in (project["dependencies"], *extras) for one in group]


def test_each_line_is_one_public_version() -> None:
    for lines in locked().values():
        for requirement in lines:
            (pin,) = requirement.specifier
            assert pin.operator == "==", requirement
            assert Version(pin.version).local is None, requirement
            assert requirement.url is None, requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_asked_for_is_pinned_once_above_its_floor(python: str) -> None:
    pins = locked()
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
    }
    for requirement in wanted():
        if requirement.marker is not None and not requirement.marker.evaluate(machine):
            continue
        lines = [
            one
            for one in pins[canonicalize_name(requirement.name)]
            if one.marker is None or one.marker.evaluate(machine)
        ]
        assert len(lines) == 1, f"{requirement}: run `make lock`"
        (pin,) = lines[0].specifier
        assert requirement.specifier.contains(pin.version, prereleases=True), requirement


def test_the_libraries_of_one_kind_of_gpu_are_left_to_torch() -> None:
    assert not [name for name in locked() if name.startswith(("nvidia-", "cuda-", "triton"))]
