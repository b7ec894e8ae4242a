"""The bundled model draws and says what it did before: hashes of codes and captions."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import mmdlm
from mmdlm.core.sampling.generators import Generators
from mmdlm.pipeline.model import Model

BUNDLED = Path(mmdlm.__file__).parent / "checkpoints" / "emoji"
pytestmark = pytest.mark.skipif(not BUNDLED.is_dir(), reason="no bundled model in this tree")

# With seed 0, at the defaults of the model, on a CPU in float32. Where a change is meant to change
# what is drawn, put in what the failing test shows.
CODES = {
    "red heart": "00dbb755bd1be365",
    "dog": "09522bf0cf4d9145",
    "rocket": "8c99dfa8a91e11c3",
    "rainbow": "7a5d68c7b15902b9",
}
CAPTIONS = {
    "red heart": "c6d2cbdef01121ff",
    "dog": "796e43a5a8cdb73b",
    "rocket": "c58dd0a3760008c9",
    "rainbow": "8fced00b6ce28145",
}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def seeds(count: int) -> Generators:
    return [torch.Generator().manual_seed(0) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> Model:
    return mmdlm.load("emoji", device="cpu")


@pytest.fixture(scope="module")
def codes(model: Model) -> torch.Tensor:
    """[B, K] codes of the drawings, before the image tokenizer decodes them."""
    run = model.drawing([*CODES], {"generator": seeds(len(CODES))})
    return model.codes(run, run.run())


def test_drawings_have_the_same_codes(codes: torch.Tensor) -> None:
    found = [digest(row.numpy().tobytes()) for row in codes]
    assert dict(zip(CODES, found, strict=True)) == CODES


def test_captions_are_the_same(model: Model, codes: torch.Tensor) -> None:
    edge = model.square
    captions = model.caption(model.decode(codes, edge, alone=True), generator=seeds(len(codes)))
    found = [digest(text.encode()) for text in captions]
    assert dict(zip(CAPTIONS, found, strict=True)) == CAPTIONS
