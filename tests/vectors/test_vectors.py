"""Outputs of the original implementations, found in folders and not named here.

Every sub-folder of MMDLM_VECTORS (default: ../shared/vectors, seen from the repository) is one
checkpoint with `config.json`, `model.safetensors` and `expected.safetensors`. The family in its
config picks the check, so that a new vector of a known family needs no new test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdlm.vision.image_tokenizer import load_image_tokenizer
from mmdlm.vision.magvit2 import Magvit2Tokenizer

ROOT = Path(__file__).parents[2]
VECTORS = Path(os.environ.get("MMDLM_VECTORS") or ROOT.parent / "shared" / "vectors")


def check_magvit2(folder: Path) -> None:
    """The same codes, except where a channel is all but zero, and the same pixels."""
    tokenizer = load_image_tokenizer(folder)
    assert isinstance(tokenizer, Magvit2Tokenizer)
    expected = load_file(folder / "expected.safetensors")
    pixels, codes = expected["pixel_values"], expected["codes"]
    with torch.no_grad():
        z = tokenizer.encoder(pixels)
        reconstruction = tokenizer.decode(codes)
    torch.testing.assert_close(z, expected["encoder_out"], atol=1e-4, rtol=1e-4)
    decided = (z.abs() > 1e-5).all(1).flatten(1)  # [N, K]
    assert decided.float().mean() > 0.9
    assert torch.equal(tokenizer.encode(pixels)[decided], codes[decided])
    torch.testing.assert_close(reconstruction, expected["reconstruction"], atol=1e-4, rtol=0)


# What to check per family: the `_class_name` or `model_type` of a config.
CHECKS: dict[str, Callable[[Path], None]] = {"MAGVITv2": check_magvit2}


def folders() -> list:
    """One parameter per vector; a single skipped one where there are none."""
    found = sorted(path.parent for path in VECTORS.glob("*/config.json"))
    if not found:
        reason = f"no vectors in {VECTORS}; set MMDLM_VECTORS to their folder"
        return [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(path, id=path.name) for path in found]


@pytest.mark.parametrize("folder", folders())
def test_matches_the_original_implementation(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    family = config.get("_class_name") or config.get("model_type")
    if family not in CHECKS:
        pytest.skip(f"family {family!r} is not implemented yet")
    CHECKS[family](folder)
