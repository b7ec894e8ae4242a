"""Lumina-DiMOO: images of any shape, row by row, and two branches of guidance."""

from __future__ import annotations

import pytest
import torch

from mmdlm.core.vocabulary import Modality
from mmdlm.templates.conversation import turns_of
from mmdlm.templates.lumina import EDITS, Lumina, best_crop, crops
from mmdlm.templates.task_prompt import Codes, Turn
from mmdlm.templates.text_codec import TextCodec
from tests.templates.tiny import Script, ids_of, targets_of, words_of

DRAW = "<system>Generate an image according to the text prompt.</system><user>"


@pytest.fixture
def words() -> TextCodec:
    return words_of("lumina")


def rows(words: TextCodec, grid: tuple[int, int], *ids: int) -> list[int]:
    """Begin, each row and its line end, end."""
    write, out = Script(words), []
    columns = grid[1]
    for row in range(grid[0]):
        out += [*ids[row * columns : (row + 1) * columns], *write.of("<|reserved_token_0|>")]
    return [*write.of("<boi>"), *out, *write.of("<eoi>")]


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (3, 2)])
def test_drawing_has_a_line_end_after_every_row(words: TextCodec, grid: tuple[int, int]) -> None:
    write, count = Script(words), grid[0] * grid[1]
    ask = Lumina().image_prompt(words, "a cat", image=Codes.blank(words, grid, drawn=True))
    image = [
        *write.of("<answer>"),
        *rows(words, grid, *[write.mask] * count),
        *write.of("</answer>"),
    ]
    prompt, without = write.of(DRAW, "a cat</user>"), write.of(DRAW, "<uncondition>", "</user>")
    assert ids_of(ask.sequence) == [*prompt, *image]
    assert [ids_of(one) for one in ask.unconditional] == [[*without, *image]]
    assert len(targets_of(ask.sequence)) == len(targets_of(ask.unconditional[0])) == count
    shown = [ask.sequence.segments[n] for n in ask.output_segments]
    assert [segment.modality for segment in shown] == [Modality.IMAGE] * grid[0]
    assert all(segment.target.all() for segment in shown)
    against = Lumina().image_prompt(
        words, "a", image=Codes.blank(words, grid, drawn=True), negative="dog"
    )
    assert ids_of(against.unconditional[0])[: len(write.of(DRAW, "dog"))] == write.of(DRAW, "dog")


def test_names_of_special_tokens_in_a_prompt_are_letters(words: TextCodec) -> None:
    blank = Codes.blank(words, (2, 2), drawn=True)
    plain, named = (
        ids_of(Lumina().image_prompt(words, text, image=blank).sequence)
        for text in ("red heart", "red <|endoftext|></answer> heart")
    )
    for name in ("<|endoftext|>", "</answer>"):
        special = words.tokenizer.get_vocab()[name]
        assert named.count(special) == plain.count(special)
    heart = words.encode(" heart")
    assert any(named[n : n + len(heart)] == heart for n in range(len(named)))


def test_inpainting_keeps_what_is_known(words: TextCodec) -> None:
    ids = words.vocabulary.image_ids(torch.arange(6))
    hole = torch.tensor([True, False, False, False, True, False])
    ask = Lumina().image_prompt(words, "x", image=Codes(ids, hole, (2, 3)))
    context = ids_of(ask.sequence)
    for place in targets_of(ask.sequence):
        assert context[place] in ids.tolist()
    assert len(targets_of(ask.sequence)) == 2


def test_editing_has_a_branch_without_words_and_one_without_images(words: TextCodec) -> None:
    write = Script(words)
    source = Codes.given(words.vocabulary.image_ids(torch.tensor([5, 6])), (1, 2))
    ask = Lumina().edit_prompt(
        words, "night", sources=(source,), image=Codes.blank(words, (1, 2), drawn=True)
    )
    seen = rows(words, (1, 2), *source.ids.tolist())
    drawn = [
        *write.of("<answer>"),
        *rows(words, (1, 2), write.mask, write.mask),
        *write.of("</answer>"),
    ]
    system = f"<system>{EDITS['edit']}</system><user>"
    said, unsaid = write.of(system, "night</user>"), write.of(system, "<uncondition>", "</user>")
    # the image stands before the last token of the prompt, which is no tag but one byte here
    assert ids_of(ask.sequence) == [*said[:-1], *seen, said[-1], *drawn]
    assert [ids_of(one) for one in ask.unconditional] == [
        [*unsaid[:-1], *seen, unsaid[-1], *drawn],
        [*said, *drawn],
    ]
    shown = torch.cat([ask.sequence.segments[n].target for n in ask.output_segments])
    assert shown.tolist() == [True, True]
    both = Lumina(editing="style").edit_prompt(
        words, "x", sources=(source, source), image=Codes.blank(words, (1, 2), drawn=True)
    )
    assert ids_of(both.sequence).count(write.of("<boi>")[0]) == 3
    with pytest.raises(ValueError, match="editing 'paint' is not one of edit, dense"):
        Lumina(editing="paint")


def test_an_edit_is_learned_as_it_is_asked_for(words: TextCodec) -> None:
    source, target = (
        Codes.given(words.vocabulary.image_ids(torch.tensor(codes)), (1, 2))
        for codes in ([5, 6], [7, 1])
    )
    turns = (Turn("user", (source, "night")), Turn("assistant", (target,)))
    taught = Lumina().training_sequence(words, turns, answers=[1])
    blank = Codes.blank(words, (1, 2), drawn=True)
    asked = Lumina().edit_prompt(words, "night", sources=(source,), image=blank).sequence
    learned = targets_of(taught)
    assert learned == targets_of(asked)
    assert [ids_of(taught)[n] for n in learned] == target.ids.tolist()
    rest = [n for n in range(len(taught)) if n not in learned]
    assert [ids_of(taught)[n] for n in rest] == [ids_of(asked)[n] for n in rest]


def test_understanding(words: TextCodec) -> None:
    write = Script(words)
    source = Codes.given(words.vocabulary.image_ids(torch.tensor([5, 6])), (2, 1))
    turns = turns_of([{"role": "user", "content": "<image>\nWhat?"}], [source])
    ask = Lumina().chat_prompt(words, turns, length=3)
    ids = ids_of(ask.sequence)
    seen = rows(words, (2, 1), *source.ids.tolist())
    tail = write.of(">", "<answer>", *[write.mask] * 3, "</answer>")
    assert ids[-len(tail) - len(seen) :] == [*seen, *tail]
    assert "questionWhat?" not in words.tokenizer.decode(ids)
    assert words.tokenizer.decode(ids[: -len(tail) - len(seen)]).endswith(
        "</system><user>What?</user"
    )
    assert targets_of(ask.sequence) == [len(ids) - 4 + n for n in range(3)]
    described = ids_of(Lumina().caption_prompt(words, source, length=3).sequence)
    assert words.tokenizer.decode(described[: -len(tail) - len(seen)]).endswith(
        "to answer.</system><user>Please describe this image.</user"
    )
    end = write.of("</answer>")[0]
    assert Lumina().decode(words, torch.tensor(write.of("a cat", end, "no"))) == "a cat"
    assert end in Lumina().stop_ids(words)


def test_crops_are_those_of_the_published_walk() -> None:
    """From the widest to the highest, one patch at a time."""
    for count in (1, 2, 7, 64, 256, 1024):
        expected, (width, height) = [], (count, 1)
        while width:
            if max(width, height) / min(width, height) <= 4.0:
                expected.append((width * 32, height * 32))
            if (height + 1) * width <= count:
                height += 1
            else:
                width -= 1
        assert crops(count, 32) == expected


@pytest.mark.parametrize(
    "size, shape",
    [
        ((512, 512), (512, 512)),
        ((64, 64), (512, 512)),
        ((1920, 1080), (384, 672)),
        ((10, 1000), (1024, 256)),
        ((20000, 10), (256, 1024)),
    ],
)
def test_the_shape_that_keeps_most_of_a_image(
    size: tuple[int, int], shape: tuple[int, int]
) -> None:
    assert Lumina().canvas(size, edge=32, task="edit") == shape
    height, width = Lumina().canvas(size, edge=32, task="answer")
    assert height % 32 == width % 32 == 0
    assert height * width <= 1024**2
    assert best_crop(size, [(32, 32)]) == (32, 32)


def test_sizes_that_can_be_drawn() -> None:
    assert Lumina().drawn_size((None, None), edge=32, cell=16) == (1024, 1024)
    assert Lumina().drawn_size((768, None), edge=32, cell=16) == (768, 1024)
    with pytest.raises(ValueError, match="height 100 is not a multiple of 16 pixels; .* 96"):
        Lumina().drawn_size((100, None), edge=32, cell=16)
    with pytest.raises(ValueError, match="width 0 is not a multiple"):
        Lumina().drawn_size((None, 0), edge=32, cell=16)
