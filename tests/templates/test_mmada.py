"""MMaDA: its task tokens and codes, and the defects that are options."""

from __future__ import annotations

import pytest
import torch

from mmdlm.core.vocabulary import Modality
from mmdlm.pipeline.generation_run import with_generated
from mmdlm.templates.conversation import turns_of
from mmdlm.templates.mmada import THINK, THINK_TO_DRAW, Mmada
from mmdlm.templates.task_prompt import Codes
from mmdlm.templates.text_codec import TextCodec
from tests.templates.tiny import Script, ids_of, modality_of, targets_of, words_of

HEADER = ("<|start_header_id|>", "<|end_header_id|>")


@pytest.fixture
def words() -> TextCodec:
    return words_of("mmada")


def seen(words: TextCodec, *codes: int) -> Codes:
    return Codes.given(words.vocabulary.image_ids(torch.tensor(codes)), (2, 2))


def user(content: str, *images: Codes) -> tuple:
    return turns_of([{"role": "user", "content": content}], images)


def test_a_code_is_an_id_behind_the_tokenizer(words: TextCodec) -> None:
    assert int(words.vocabulary.image_ids(torch.tensor(0))) == len(words.tokenizer)


def test_drawing(words: TextCodec) -> None:
    write = Script(words)
    ask = Mmada().image_prompt(words, "a cat", image=Codes.blank(words, (2, 2), drawn=True))
    image = ["<|soi|>", *[write.mask] * 4, "<|eoi|>"]
    t2i, bos, eos = "<|t2i|>", "<|startoftext|>", "<|endoftext|>"
    assert ids_of(ask.sequence) == write.of(t2i, bos, "a cat", eos, *image)
    assert [ids_of(one) for one in ask.unconditional] == [write.of(t2i, bos, eos, *image)]
    assert targets_of(ask.sequence) == [
        len(write.of(t2i, bos, "a cat", eos)) + 1 + n for n in range(4)
    ]
    assert targets_of(ask.unconditional[0]) == [4, 5, 6, 7]
    assert [ask.sequence.segments[n].modality for n in ask.output_segments] == [Modality.IMAGE]
    against = Mmada().image_prompt(
        words, "a", image=Codes.blank(words, (2, 2), drawn=True), negative="dog"
    )
    assert ids_of(against.unconditional[0]) == write.of(t2i, bos, "dog", eos, *image)


def test_a_part_of_a_image_is_drawn_anew(words: TextCodec) -> None:
    write = Script(words)
    known = seen(words, 3, 1, 4, 1)
    hole = Codes(known.ids, torch.tensor([False, True, False, True]), (2, 2))
    ask = Mmada().image_prompt(words, "", image=hole)
    first = len(words.tokenizer)
    assert ids_of(ask.sequence)[3:] == write.of(
        "<|soi|>", first + 3, first + 1, first + 4, first + 1, "<|eoi|>"
    )
    assert targets_of(ask.sequence) == [5, 7]


def test_published_padding_is_an_option(words: TextCodec) -> None:
    write = Script(words)
    blank = Codes.blank(words, (2, 2), drawn=True)
    ask = Mmada(attend_pads=True).image_prompt(words, "a cat", image=blank)
    for sequence, text in ((ask.sequence, "a cat"), (ask.unconditional[0], "")):
        prompt = write.of("<|t2i|>", "<|startoftext|>", text, "<|endoftext|>")
        ids = ids_of(sequence)
        assert len(ids) == 513 + 1 + 4 + 1
        assert ids[:513] == write.of(*["[iPAD]"] * (513 - len(prompt))) + prompt
    assert modality_of(ask.sequence)[0] == Modality.TEXT


def test_understanding(words: TextCodec) -> None:
    write = Script(words)
    turns = user("<image>\nWhat is it?", seen(words, 3, 1, 4, 1))
    ask = Mmada().chat_prompt(words, turns, length=2)
    first = len(words.tokenizer)
    start, end = HEADER
    expected = write.of(
        *("<|mmu|>", "<|soi|>", first + 3, first + 1, first + 4, first + 1, "<|eoi|>"),
        *("<|startoftext|>", start, "user", end, "\nWhat is it?", "<|eot_id|>"),
        *(start, "assistant", end, "\n", write.mask, write.mask),
    )
    assert ids_of(ask.sequence) == expected
    # all of the prompt is masked in the other branch, markers and task token included
    assert ids_of(ask.unconditional[0]) == [write.mask] * len(expected)
    literal = Mmada(literal_eot=True).chat_prompt(words, turns, length=2)
    letters = write.of("\nWhat is it?", "<eot_id>", start)
    ids = ids_of(literal.sequence)
    assert any(ids[n : n + len(letters)] == letters for n in range(len(ids)))
    assert Mmada().decode(words, torch.tensor(write.of("yes<eot_id>no"))) == "yes"


def test_conversation_without_a_image(words: TextCodec) -> None:
    write = Script(words)
    start, end = HEADER
    ask = Mmada().chat_prompt(words, user("hi"), length=1)
    assert ids_of(ask.sequence) == write.of(
        *("<|startoftext|>", start, "user", end, "\nhi", "<|eot_id|>", start, "assistant", end),
        *("\n", write.mask),
    )
    thinking = Mmada().thinking(user("hi"), True)
    assert thinking[-1].parts == (THINK, "hi")
    assert Mmada().thinking(user("hi"), False) == user("hi")
    assert THINK.endswith("answer here\n")


def test_talking_needs_no_tokens_of_drawing() -> None:
    plain = words_of("llada")
    assert Mmada().chat_prompt(plain, user("hi"), length=1).output_segments == (1,)
    with pytest.raises(ValueError, match=r"has no <\|t2i\|> or <\|reserved_token_4\|>, which"):
        Mmada().image_prompt(plain, "a", image=Codes.blank(plain, (2, 2), drawn=True))


def test_text(words: TextCodec) -> None:
    write = Script(words)
    ask = Mmada().completion_prompt(words, "once", length=1)
    assert ids_of(ask.sequence) == write.of("<|startoftext|>", "once", write.mask)
    ask = Mmada().infill_prompt(words, "a[MASK]", image=seen(words, 0, 1, 2, 3))
    first = len(words.tokenizer)
    text = write.of("<|startoftext|>", "a", write.mask, "<|endoftext|>")
    assert ids_of(ask.sequence) == write.of(
        *("<|mmu|>", "<|soi|>", first, first + 1, first + 2, first + 3, "<|eoi|>"), *text
    )
    assert ids_of(ask.unconditional[0]) == write.of(
        *("<|mmu|>", "<|soi|>", *[write.mask] * 4, "<|eoi|>"), *text
    )


def test_thinking_before_drawing(words: TextCodec) -> None:
    write = Script(words)
    start, end = HEADER
    ask = Mmada().thinking_prompt(words, "a cat", grid=(2, 2))
    prompt = write.of(
        *("<|r2i|>", "<|startoftext|>", start, "user", end, "\n", THINK_TO_DRAW, "a cat"),
        *("<|eot_id|>", start, "assistant", end, "\n"),
    )
    image = write.of("<|soi|>", *[write.mask] * 4, "<|eoi|>")
    room = 513 - len(prompt)
    assert ids_of(ask.sequence) == [*prompt, *[write.mask] * room, *image]
    assert targets_of(ask.sequence) == [len(prompt) + n for n in range(room)]
    thought = torch.arange(room) % 9
    row = torch.tensor([*prompt, *thought.tolist(), *image])
    drawn = Mmada().image_prompt_after_thinking(
        words, with_generated(ask.sequence, row), image=Codes.blank(words, (2, 2), drawn=True)
    )
    assert ids_of(drawn.sequence) == row.tolist()
    assert targets_of(drawn.sequence) == [514, 515, 516, 517]
    assert ids_of(drawn.unconditional[0]) == [*prompt[:1], *[write.mask] * 512, *image]
    with pytest.raises(ValueError, match="leaves no room to think in the 512 tokens"):
        Mmada().thinking_prompt(words, "x" * 500, grid=(2, 2))


def test_what_it_was_not_trained_on(words: TextCodec) -> None:
    with pytest.raises(ValueError, match="looks at one image in a conversation, not 2"):
        Mmada().chat_prompt(
            words,
            user("<image><image>", seen(words, 0, 0, 0, 0), seen(words, 1, 1, 1, 1)),
            length=1,
        )
    with pytest.raises(ValueError, match="has 511 tokens, but this model was trained on at most"):
        Mmada().image_prompt(words, "x" * 511, image=Codes.blank(words, (2, 2), drawn=True))
