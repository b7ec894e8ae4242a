"""Tiny models with random weights that harnesses ask."""

from __future__ import annotations

import pytest

from mmdlm.pipeline.model import Model
from mmdlm.pipeline.task_defaults import Defaults
from mmdlm.templates.auto import LAYOUTS
from tests.templates.tiny import transformer, words_of


def tiny(family: str) -> Model:
    """A model of a family that reads only text, over bytes, with the family's own sampling."""
    words, template = words_of(family), LAYOUTS[family]
    defaults = Defaults().updated({**template.generation, "max_new_tokens": 16})
    shift = {"shift": True} if family == "dream" else {}
    return Model(
        transformer(words.vocabulary, **shift),
        words.tokenizer,
        max_length=512,
        defaults=defaults,
        prompt_template=template,
    )


@pytest.fixture(scope="session")
def llada() -> Model:
    return tiny("llada")


@pytest.fixture(scope="session")
def dream() -> Model:
    return tiny("dream")
