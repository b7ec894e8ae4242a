"""What users write becomes letters, also where it is the name of a special token."""

from __future__ import annotations

import pytest

from mmdlm.templates.auto import LAYOUTS
from tests.templates.tiny import ids_of, words_of

NAMED = "<|endoftext|> and <|mask|>"


def test_prompts_and_templates() -> None:
    words = words_of("llada")
    special = {words.vocabulary.mask_id, words.vocabulary.eos_id}
    assert words.tokenizer.decode(words.prompt(NAMED)) == NAMED
    assert not special & set(words.prompt(NAMED).tolist())
    ids, hole = words.parse_infill_template(f"{NAMED} [MASK:2] {NAMED}")
    assert hole.sum() == 2
    assert not special & set(ids[~hole].tolist())


@pytest.mark.parametrize("family", ["llada", "dream", "mmada", "mmdlm"])
def test_texts_that_go_on(family: str) -> None:
    words = words_of("llada" if family == "mmdlm" else family)
    before = ids_of(LAYOUTS[family].completion_prompt(words, NAMED, length=1).sequence)[:-1]
    text = words.encode(NAMED)
    assert before[-len(text) :] == text
    assert words.vocabulary.eos_id not in text
