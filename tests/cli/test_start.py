"""What happens between `import mmdlm` and the first result: nothing is printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRAW = """
import mmdlm
import mmdlm.models
model = mmdlm.load("emoji", device="cpu")
model.text_to_image("red heart", num_inference_steps=1)
"""


@pytest.mark.slow
def test_nothing_is_printed_from_import_to_image() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", DRAW], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
