"""A tiny model that knows nothing, for benchmarks to ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdlm.pipeline.convert import convert
from tests.templates.tiny import transformer, words_of


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in LLaDA's format: random weights over bytes."""
    folder = tmp_path_factory.mktemp("speaker")
    words = words_of("llada")
    transformer(words.vocabulary).float().save_pretrained(folder / "ours")
    list(convert(folder / "ours", folder / "llada", to="llada"))
    words.tokenizer.save_pretrained(folder / "llada")
    return folder / "llada"
