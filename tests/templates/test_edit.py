"""Edits by models trained here: what is learned is what is asked for, branch by branch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from data_pipelines.sources.conversations import Conversation
from mmdlm.core.vocabulary import Modality
from mmdlm.templates.chat_template import PLAIN
from mmdlm.templates.mmada import Mmada
from mmdlm.templates.native import Native
from mmdlm.templates.task_prompt import Codes, Turn
from mmdlm.templates.text_codec import TextCodec
from tests.templates.test_chat_template import words_with
from tests.templates.tiny import ids_of, targets_of

GRID = (2, 2)


@pytest.fixture
def words() -> TextCodec:
    return words_with(PLAIN, grid=GRID)


def image(words: TextCodec, *codes: int) -> Codes:
    return Codes.given(words.vocabulary.image_ids(torch.tensor(codes)), GRID)


def conversation(words: TextCodec, *sources: Codes) -> tuple[Turn, ...]:
    return Turn("user", (*sources, " make it blue")), Turn("assistant", (image(words, 4, 5, 6, 7),))


def test_an_edit_is_images_then_words_then_the_image_to_be_drawn(words: TextCodec) -> None:
    known, vocabulary = image(words, 0, 1, 2, 3), words.vocabulary
    ask = Native().edit_prompt(
        words, "make it blue", sources=(known,), image=Codes.blank(words, GRID, drawn=True)
    )
    text = [*words.encode_with_specials("make it blue"), vocabulary.eos_id]
    begin, end = vocabulary.image_markers
    mask = vocabulary.mask_id
    drawn = [begin, *[mask] * 4, end]
    shown = [begin, *known.ids.tolist(), end]
    assert ids_of(ask.sequence) == [*shown, *text, *drawn]
    without_words, without_image = ask.unconditional
    assert ids_of(without_words) == [*shown, *[mask] * len(text), *drawn]
    assert ids_of(without_image) == [begin, *[mask] * 4, end, *text, *drawn]
    (segment,) = (ask.sequence.segments[number] for number in ask.output_segments)
    assert segment.modality == Modality.IMAGE
    for sequence in (ask.sequence, *ask.unconditional):
        at = targets_of(sequence)
        assert at == list(range(len(shown) + len(text) + 1, len(shown) + len(text) + 5))


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_learned_is_what_is_asked_for(words: TextCodec, count: int) -> None:
    sources = tuple(image(words, n, 1, 2, 3) for n in range(count))
    taught = Native().training_sequence(words, conversation(words, *sources), answers=[1])
    blank = Codes.blank(words, GRID, drawn=True)
    asked = Native().edit_prompt(words, "make it blue", sources=sources, image=blank).sequence
    learned = targets_of(taught)
    assert learned == targets_of(asked)
    assert [ids_of(taught)[n] for n in learned] == image(words, 4, 5, 6, 7).ids.tolist()
    rest = [n for n in range(len(taught)) if n not in learned]
    assert [ids_of(taught)[n] for n in rest] == [ids_of(asked)[n] for n in rest]


def test_each_branch_of_the_guidance_is_learned_as_often_as_said(words: TextCodec) -> None:
    turns = conversation(words, image(words, 0, 1, 2, 3))
    spoken = Conversation(drop_prompt=0.4).templated(Native(), words, length=64)
    blank = Codes.blank(words, GRID, drawn=True)
    ask = Native().edit_prompt(
        words, "make it blue", sources=(image(words, 0, 1, 2, 3),), image=blank
    )

    def context(sequence):
        targets = targets_of(sequence)
        return tuple(i for n, i in enumerate(ids_of(sequence)) if n not in targets)

    found = Counter()
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        found[context(spoken._taught(turns, [1], generator=generator))] += 1
    whole, without_words, without_image = map(context, (ask.sequence, *ask.unconditional))
    assert found.keys() == {whole, without_words, without_image}
    assert 20 < found[without_words] < 60
    assert 20 < found[without_image] < 60


def test_a_family_that_does_not_edit_says_so(words: TextCodec) -> None:
    with pytest.raises(ValueError, match="learns to draw images of codes, from words only"):
        Mmada().training_sequence(words, conversation(words, image(words, 0, 1, 2, 3)), answers=[1])


def test_an_image_for_an_image_without_words_is_no_edit(words: TextCodec) -> None:
    turns = (Turn("user", (image(words, 0, 1, 2, 3),)), conversation(words)[1])
    assert Native().image_edit(turns) is None
    with pytest.raises(ValueError, match="from words only"):
        Native().training_sequence(words, turns, answers=[1])
