"""transformers' own suite for models runs over ours: no failure, and a reason for each skip."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from mmdlm.atomic_files import atomic_folder

ROOT = Path(__file__).parents[2]
SUITE = Path(__file__).with_name("common_suite.py")

# What transformers says of a test that it leaves out -> why it has nothing to test here.
HARDWARE = "the machine or an optional package is missing: the same test runs where they are"
SKIPS = {
    r"test requires .*": HARDWARE,
    r"test is slow": "transformers runs these by RUN_SLOW=1, most of them on a GPU",
    r".*_keep_in_fp32_modules.*": "no module of ours has to stay in float32",
    r".* does not support grouped_mm": "there are no experts",
    r"This model has no sparse experts\.": "there are no experts",
    r"This model has no `output_router_logits` in its config\.": "there are no experts",
    r"Not a prioritized model for now\.": "of tensor parallelism by a plan, which we have not",
    r"Model does not have a TP plan\.": "of tensor parallelism by a plan, which we have not",
    r"Model does not have position embeddings": "positions are rotary",
    r"Model does not support sliding window mask": "all layers see all tokens",
    r"Model is not a composite model\.": "our config is one config, the vision tower's in a field",
    r"This model is not composite": "the same",
    r"No subconfigs so the test does not make sense": "the same",
    r"No conversion found for .*": "tensors have the names in files that they have in memory",
    r"No usage of the `capture_outputs` decorator\.": "we collect hidden states ourselves",
    r"Cannot capture hidden states, .*": "the same",
    r"Do not take a cache as input to forward": "of generation token by token",
    r"No decoder-only language modeling head to check": "labels are not shifted",
    r"No sequence-to-sequence language modeling head to check": "there is no encoder-decoder",
    r"This model has no `base_model_class` defined in tester\.": "of rope settings in our words; "
    "tests/models/test_transformer.py compares them",
    r"a vision tower keeps its own kernel, whatever the language model's is": "by design",
    r".* does not support SDPA": "of composite models, which transformers says so; the others run",
}


@pytest.fixture(scope="module")
def their_tests() -> Path:
    """The folder of transformers' tests, of the installed version, from its source distribution."""
    name = f"transformers-{version('transformers')}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmdlm" / name
    if not cache.is_dir():
        _download(name, cache)
    return cache / name / "tests"


def _download(name: str, cache: Path) -> None:
    """Unpack the tests of a release into a folder, which appears whole or not at all."""
    package, number = name.split("-")
    with atomic_folder(cache, replace=False) as part:
        command = ["-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--quiet", "--dest", str(part)]
        done = subprocess.run(
            [sys.executable, *command, f"{package}=={number}"], capture_output=True, text=True
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no word from pip"])[-1]
            pytest.skip(f"the source distribution of {name} cannot be downloaded: {reason}")
        archive = next(part.glob("*.tar.gz"))
        with tarfile.open(archive) as file:
            members = [one for one in file if one.name.startswith(f"{name}/tests/")]
            file.extractall(part, members=members, filter="data")
        archive.unlink()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("suite", ["TextSuite", "SeeingSuite", "EncoderSuite"])
def test_the_suite_of_transformers(suite: str, their_tests: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", f"{SUITE}::{suite}", "-q", "--tb=short"),
            *("-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "-W", "ignore"),
            *("-o", "timeout=1200", f"--junitxml={report}"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRANSFORMERS_TESTS": str(their_tests)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    skipped = Counter(one.attrib["message"] for one in ET.parse(report).iter("skipped"))
    strange = [said for said in skipped if not any(re.fullmatch(one, said) for one in SKIPS)]
    assert not strange, f"skipped without a reason here: {strange}"
    passed = sum(1 for _ in ET.parse(report).iter("testcase")) - skipped.total()
    assert passed > 80
    print(f"{suite}: {passed} passed, {skipped.total()} skipped")
