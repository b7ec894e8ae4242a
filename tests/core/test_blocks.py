"""Blocks of a batch: how documents are cut, and who sees whom in a model that is cut so."""

from __future__ import annotations

import pytest
import torch

from mmdlm.core.blocks import PromptBlocks, block_numbers, in_blocks
from mmdlm.core.sequence import Batch, Sequence, collate, pack, text_segment
from mmdlm.core.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(text_size=23, eos_id=0, image_codes=0)


def document(prompt: int, answer: int) -> Sequence:
    ids = torch.arange(prompt + answer) % 20
    return Sequence((text_segment(ids[:prompt]), text_segment(ids[prompt:], target=True)))


def layouts() -> dict[str, Batch]:
    documents = [document(5, 6), document(2, 4), document(0, 7), document(3, 0)]
    return {
        "padded": collate(documents, VOCABULARY),
        "packed": pack(documents, VOCABULARY, length=16),
    }


def enumerated(prompt: int, length: int, block: int, cut: PromptBlocks) -> list[int]:
    """Numbers of the blocks of one document, from the words of the definition."""
    if cut == "blocks":
        return [place // block for place in range(length)]
    before = list(range(prompt)) if cut == "causal" else [0] * prompt
    first = prompt if cut == "causal" else 1
    return before + [first + place // block for place in range(length - prompt)]


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("cut", ["blocks", "prefix", "causal"])
@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_documents_are_cut_each_by_itself(kind: str, cut: PromptBlocks, block: int) -> None:
    batch = layouts()[kind]
    numbers = block_numbers(batch, block, prompt=cut)
    seen = 0
    for row in range(len(batch)):
        for number in range(int(batch.document[row].max()) + 1):
            inside = batch.document[row] == number
            target = batch.target[row][inside]
            prompt = int((~target).long().cumprod(0).sum())
            found = numbers[row][inside].tolist()
            assert found == enumerated(prompt, len(target), block, cut)
            seen += 1
    assert seen == 4


def test_what_cannot_be_cut_is_said() -> None:
    batch = layouts()["padded"]
    with pytest.raises(ValueError, match="block_length must be a whole number of at least 1"):
        in_blocks(batch, 0)
    with pytest.raises(ValueError, match="one of blocks, prefix, causal, not 'suffix'"):
        in_blocks(batch, 4, prompt="suffix")  # type: ignore[arg-type]


def test_numbers_stay_with_their_rows() -> None:
    batch = in_blocks(layouts()["padded"], 3)
    some = batch.with_host_masks().rows(torch.tensor([2, 0]))
    assert batch.block is not None
    assert some.block is not None
    assert torch.equal(some.block, batch.block[[2, 0]])
