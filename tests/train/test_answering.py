"""What of an answer is learned: all that rewards have seen, and nothing behind its end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipelines.sources.problems import Problem, Prompt
from mmdlm.templates.auto import prompt_template_for
from tests.templates.tiny import words_of
from train.rollouts.answering import _seen


def model_of(family: str) -> Any:
    return SimpleNamespace(
        prompt_template=prompt_template_for(family, seeing=False), codec=words_of(family)
    )


def seen(family: str, text: str, *, stop: tuple[str, ...] = (), ended: bool = False) -> str:
    """The part of a text that is learned; `ended` puts the family's end behind it."""
    model = model_of(family)
    ids = model.codec.encode_with_specials(text)
    if ended:
        ids = [*ids, model.prompt_template.stop_ids(model.codec)[0]]
    problem = Problem("p", Prompt("q", stop=stop), {})
    count = _seen(model, problem, torch.tensor(ids))
    kept = ids[:count]
    return str(model.codec.tokenizer.decode([i for i in kept if i < len(model.codec.tokenizer)]))


@pytest.mark.parametrize("family", ["llada", "mmada"])
def test_an_answer_that_ends_or_fills_its_room_is_learned_whole(family: str) -> None:
    assert seen(family, "it is 7") == "it is 7"
    whole = seen(family, "it is 7", ended=True)
    assert whole.startswith("it is 7")
    assert len(whole) > len("it is 7")  # the end is learned, too


def test_what_stands_behind_a_stop_is_not_learned() -> None:
    """The text that stops it is."""
    assert seen("llada", "it is 7 Question: next", stop=("Question:",)) == "it is 7 Question:"


def test_letters_that_end_a_text_of_mmada_are_its_end() -> None:
    assert seen("mmada", "it is 7<eot_id>and so on and on") == "it is 7<eot_id>"
    assert seen("llada", "it is 7<eot_id>and so on") == "it is 7<eot_id>and so on"
