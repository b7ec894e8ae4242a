"""What is trained on is what is asked for: conversations to learn from, layout by layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmdlm.core.sequence import Sequence
from mmdlm.core.vocabulary import Modality
from mmdlm.templates.auto import LAYOUTS
from mmdlm.templates.llada import Llada
from mmdlm.templates.mmada import TEXT_LENGTH, Mmada
from mmdlm.templates.prompt_template import PromptTemplate
from mmdlm.templates.task_prompt import Codes, ImageInput, Turn
from mmdlm.templates.text_codec import TextCodec
from tests.templates.test_conversations import Seen, said
from tests.templates.tiny import Script, byte_tokenizer, ids_of, targets_of, words_of

ENDS = {"lumina": "</answer>", "dimple": "<|endoftext|>"}
ENDS |= dict.fromkeys(("dream", "sdar", "fast_dllm"), "<|im_end|>")
CHATTING = ["llada", "llada_v", "lavida_llada", "mmada", "dream", "lavida_dream", "dimple"]
CHATTING += ["sdar", "fast_dllm"]
TALK = (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))


def image(words: TextCodec, prompt_template: PromptTemplate, *codes: int) -> ImageInput:
    if prompt_template.sees == "features":
        return Seen(3)
    return Codes.given(words.vocabulary.image_ids(torch.tensor(codes or (3, 1, 4, 1))), (2, 2))


def learned(words: TextCodec, sequence: Sequence) -> str:
    """The targets as text, what lies between two of them as a bar."""
    places, ids = targets_of(sequence), ids_of(sequence)
    parts: list[list[int]] = [[]]
    for before, here in zip([places[0] - 1, *places], places, strict=False):
        if here != before + 1:
            parts.append([])
        parts[-1].append(ids[here])
    return "|".join(map(words.tokenizer.decode, parts))


@pytest.mark.parametrize(
    "family, seen",
    [
        (family, seen)
        for family in (*CHATTING, "lumina")
        for seen in (False, True)
        if not (seen and LAYOUTS[family].sees == "nothing")
    ],
)
def test_up_to_an_answer_it_is_the_prompt_that_asks_for_it(family: str, seen: bool) -> None:
    prompt_template, words = LAYOUTS[family], words_of(family)
    asked = Turn("user", (image(words, prompt_template), "\nwhat?") if seen else ("hi",))
    turns = (asked, Turn("assistant", ("yes",)))
    taught = prompt_template.training_sequence(words, turns, answers=[1])
    ask = prompt_template.chat_prompt(words, (asked,), length=7)
    prompt = ask.sequence.segments[: ask.output_segments[0]]
    expected = [i for s in prompt for i in s.ids.tolist()]
    assert ids_of(taught)[: len(expected)] == expected
    assert [s.modality for s in taught.segments[: len(prompt)]] == [s.modality for s in prompt]
    end = ENDS.get(family, ENDS["dream"] if "dream" in family else "<|eot_id|>")
    assert ids_of(taught)[len(expected) :] == Script(words).of("yes", end)
    assert targets_of(taught) == list(range(len(expected), len(ids_of(taught))))
    assert prompt_template.decode(words, torch.tensor(ids_of(taught)[len(expected) :])) == "yes"


@pytest.mark.parametrize("family", CHATTING)
def test_every_answer_or_some(family: str) -> None:
    prompt_template, words = LAYOUTS[family], words_of(family)
    turns = (*said(*TALK[:3]), Turn("assistant", ("four",)))
    whole = prompt_template.training_sequence(words, turns, answers=[1, 3])
    last = prompt_template.training_sequence(words, turns, answers=[3])
    chatml = ("dream", "lavida_dream", "dimple", "sdar", "fast_dllm")
    end = "<|im_end|>" if family in chatml else "<|eot_id|>"
    if family == "dimple":
        assert learned(words, whole) == "two|four<|endoftext|>"
    else:
        assert learned(words, whole) == f"two{end}|four{end}"
        assert learned(words, last) == f"four{end}"
    assert ids_of(whole) == ids_of(last)
    asked = prompt_template.chat_prompt(words, turns[:3], length=1).sequence
    assert ids_of(whole)[: len(ids_of(asked)) - 1] == ids_of(asked)[:-1]


def test_no_answer_can_end_itself() -> None:
    words = words_of("llada")
    turns = (Turn("user", ("x",)), Turn("assistant", ("a<|eot_id|>b",)))
    taught = Llada().training_sequence(words, turns, answers=[1])
    known = words.tokenizer.get_vocab()["<|eot_id|>"]
    assert ids_of(taught).count(known) == 2


# --- images as answers --------------------------------------------------------------------------


def test_a_image_is_learned_as_it_is_drawn() -> None:
    for family in ("mmada", "lumina"):
        prompt_template, words = LAYOUTS[family], words_of(family)
        shown = image(words, prompt_template)
        assert isinstance(shown, Codes)
        turns = (Turn("user", ("a cat",)), Turn("assistant", (shown,)))
        taught = prompt_template.training_sequence(words, turns, answers=[1])
        blank = Codes.blank(words, (2, 2), drawn=True)
        asked = prompt_template.image_prompt(words, "a cat", image=blank).sequence
        assert targets_of(taught) == targets_of(asked)
        got = [ids_of(taught)[i] for i in targets_of(taught)]
        assert got == shown.ids.tolist()
        rest = set(range(len(ids_of(asked)))) - set(targets_of(asked))
        assert all(ids_of(taught)[i] == ids_of(asked)[i] for i in rest)


def test_what_is_thought_before_a_image_is_learned_with_it() -> None:
    words, prompt_template = words_of("mmada"), Mmada()
    shown = image(words, prompt_template)
    turns = (
        Turn("user", ("a cat",)),
        Turn("assistant", ("<think> a red cat </think>", shown)),
    )
    taught = prompt_template.training_sequence(words, turns, answers=[1])
    asked = prompt_template.thinking_prompt(words, "a cat", grid=(2, 2)).sequence
    assert len(ids_of(taught)) == len(ids_of(asked)) == TEXT_LENGTH + 1 + 6
    first = targets_of(asked)[0]
    assert ids_of(taught)[:first] == ids_of(asked)[:first]
    text = taught.segments[1]
    assert words.tokenizer.decode(text.ids).startswith("<think> a red cat </think><|endoftext|>")
    assert text.target.all()
    assert [s.modality for s in taught.segments if s.target.any()] == [
        Modality.TEXT,
        Modality.IMAGE,
    ]
    long = Turn("assistant", ("x" * TEXT_LENGTH, shown))
    with pytest.raises(ValueError, match="there is room for"):
        prompt_template.training_sequence(words, (turns[0], long), answers=[1])


# --- models that were born here -------------------------------------------------------------------


def own_words(**options: Any) -> TextCodec:
    from mmdlm.core.vocabulary import Vocabulary

    tokenizer = byte_tokenizer()
    vocabulary = Vocabulary.build(
        text_size=len(tokenizer), eos_id=tokenizer.eos_token_id, image_codes=16
    )
    return TextCodec(tokenizer, vocabulary, **options)


@pytest.mark.parametrize("options", [{}, {"slots": 12, "grid": (2, 2)}])
def test_ours_learns_what_it_completes(options: dict[str, Any]) -> None:
    words, prompt_template = own_words(**options), LAYOUTS["mmdlm"]
    turns = (Turn("user", ("1+1=",)), Turn("assistant", ("2",)))
    taught = prompt_template.untemplated_sequence(words, turns)
    asked = prompt_template.completion_prompt(words, "1+1=", length=2).sequence
    assert len(ids_of(taught)) == len(ids_of(asked))
    first = targets_of(asked)[0]
    assert ids_of(taught)[:first] == ids_of(asked)[:first]
    assert targets_of(taught) == list(range(first, len(ids_of(taught))))
    eos = words.vocabulary.eos_id
    assert [i for i in ids_of(taught)[first:] if i != eos] == Script(words).of("2")
    with pytest.raises(ValueError, match="its 4 messages are not one question and its answer"):
        prompt_template.untemplated_sequence(words, turns + turns)
    with pytest.raises(ValueError, match="not trained for chat; .* has no chat template"):
        prompt_template.training_sequence(words, turns, answers=[1])


@pytest.mark.parametrize("family", ["mmdlm", "mmada"])
def test_without_a_template_an_image_is_learned_as_it_is_drawn(family: str) -> None:
    words = words_of("mmada") if family == "mmada" else own_words(slots=12, grid=(2, 2))
    prompt_template = LAYOUTS[family]
    turns = (Turn("user", ("a cat",)), Turn("assistant", (image(words, prompt_template),)))
    assert ids_of(prompt_template.untemplated_sequence(words, turns)) == ids_of(
        prompt_template.training_sequence(words, turns, answers=[1])
    )
    spoken = (turns[0], Turn("assistant", ("look: ", image(words, prompt_template))))
    with pytest.raises(ValueError, match="has the words 'look:' beside an image"):
        prompt_template.untemplated_sequence(words, spoken)


def test_ours_that_sees_learns_captions() -> None:
    words, prompt_template = own_words(), LAYOUTS["mmdlm-seeing"]
    turns = (Turn("user", (Seen(3),)), Turn("assistant", ("hi",)))
    taught = prompt_template.untemplated_sequence(words, turns)
    asked = prompt_template.caption_prompt(words, Seen(3), length=3).sequence
    assert targets_of(taught) == targets_of(asked) == [3, 4, 5]
    with pytest.raises(ValueError, match="questions about images"):
        prompt_template.untemplated_sequence(words, (Turn("user", (Seen(3), "how?")), turns[1]))
    with pytest.raises(ValueError, match=r"\(llada_v\) is asked about images by its template"):
        LAYOUTS["llada_v"].untemplated_sequence(words_of("llada_v"), turns)


# --- bad input ------------------------------------------------------------------------------------


def _thinking(words: TextCodec, prompt_template: PromptTemplate) -> tuple[Turn, ...]:
    return Turn("user", ("x",)), Turn("assistant", ("hm", image(words, prompt_template)))


def _two(words: TextCodec, prompt_template: PromptTemplate) -> tuple[Turn, ...]:
    return Turn("user", ("x",)), Turn("assistant", (image(words, prompt_template),) * 2)


@pytest.mark.parametrize(
    "family, turns, says",
    [
        ("lumina", _thinking, "was not trained to think before it draws"),
        ("mmada", _two, "an answer with an image has one"),
        ("lumina", lambda *_: said(*TALK[:3], TALK[2]), "one question with its answer, not 4"),
    ],
)
def test_what_is_never_asked_for(
    family: str, turns: Callable[..., tuple[Turn, ...]], says: str
) -> None:
    words, prompt_template = words_of(family), LAYOUTS[family]
    conversation = turns(words, prompt_template)
    with pytest.raises(ValueError, match=says):
        prompt_template.training_sequence(words, conversation, answers=[len(conversation) - 1])
