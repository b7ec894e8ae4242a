"""Texts as users write them: what a model is shown of them, and what comes back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmdlm.templates.dream import Dream
from mmdlm.templates.infill import check_whole, filled_text
from mmdlm.templates.llada import Llada
from mmdlm.templates.native import Native
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.templates.text_codec import TextCodec
from tests.templates.tiny import words_of

HOLE = "\N{WHITE SQUARE}"
TEXTS = {  # a text with holes -> what the model is shown
    "def f(a):\n    [MASK:2]\n    return a\n": f"def f(a):\n    {HOLE * 2}\n    return a\n",
    "one\n\n[MASK]\n\ntwo": f"one\n\n{HOLE}\n\ntwo",
    "\tx = [MASK]\t\r\n": f"\tx ={HOLE}\t\r\n",
    "  indented [MASK] end  ": f"  indented{HOLE} end  ",
    "[MASK] [MASK:2]  [MASK]-x": f"{HOLE * 3}  {HOLE}-x",
    "a [MASK][MASK] b": f"a{HOLE * 2} b",
    "\n[MASK]": f"\n{HOLE}",
    "a <|endoftext|> [MASK] <|mask|>": f"a <|endoftext|>{HOLE} <|mask|>",
}


def shown(words: TextCodec, text: str) -> str:
    ids, hole = words.parse_infill_template(text)
    place = words.encode(HOLE)
    laid_out = [place if open_ else [one] for one, open_ in zip(ids.tolist(), hole, strict=True)]
    return str(words.tokenizer.decode([i for some in laid_out for i in some]))


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_a_model_is_shown_what_stands_outside_the_holes(family: str, text: str) -> None:
    assert shown(words_of(family), text) == TEXTS[text]


@pytest.mark.parametrize(
    "prompt_template", [Llada(), Dream(), Native()], ids=lambda one: one.family
)
@pytest.mark.parametrize("text", TEXTS, ids=repr)
@pytest.mark.parametrize("letter", ["x", " ", "\n"])
def test_what_stands_outside_the_holes_comes_back(
    prompt_template: PromptTemplate, text: str, letter: str
) -> None:
    words = words_of("llada")
    _, hole = words.parse_infill_template(text)
    ids = torch.tensor(words.encode(letter) * int(hole.sum()))
    filled = filled_text(text, ids, decode=lambda some: prompt_template.continued(words, some))
    rest = filled
    for outside in text.replace("[MASK:2]", "[MASK]").split("[MASK]"):
        assert outside in rest
        rest = rest[rest.index(outside) + len(outside) :]
    first, last = text.split("[MASK", 1)[0], text.rsplit("]", 1)[1]
    assert filled.startswith(first)
    assert filled.endswith(last)


def test_a_blank_before_a_hole_is_there_once() -> None:
    def said(text: str) -> str:
        return filled_text("woman [MASK:5] tone", torch.zeros(5), decode=lambda _: text)

    assert said(" dark") == said("dark") == "woman dark tone"
    assert said("\ndark") == "woman \ndark tone"


def test_a_character_of_several_tokens_may_fill_holes_side_by_side() -> None:
    words = words_of("llada")
    heart = words.encode("\N{HEAVY BLACK HEART}")

    def decode(ids: Tensor) -> str:
        return Llada().continued(words, ids)

    text = "a [MASK][MASK][MASK]."
    assert filled_text(text, torch.tensor(heart), decode=decode) == "a \N{HEAVY BLACK HEART}."


@pytest.mark.parametrize("half", [0xD83D, 0xDCFF], ids=hex)
def test_half_a_character_is_refused(half: int) -> None:
    check_whole("red \N{HEAVY BLACK HEART}")
    words, text = words_of("llada"), f"red {chr(half)} heart"
    for call in (
        words.encode_with_specials,
        words.encode,
        words.prompt,
        lambda one: words.parse_infill_template(one + "[MASK]"),
    ):
        with pytest.raises(ValueError, match="holds half a character at place 4") as caught:
            call(text)
        str(caught.value).encode("utf-8")


def test_names_of_special_tokens_in_a_prompt_are_letters() -> None:
    words = words_of("llada")
    text = "red <|endoftext|> heart"
    assert words.prompt(text).tolist() == words.encode(text)
    assert words.vocabulary.eos_id not in words.prompt(text)
