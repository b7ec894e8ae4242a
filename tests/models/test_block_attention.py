"""A Transformer whose tokens see their own block and those before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmdlm.core.blocks import PromptBlocks, in_blocks
from mmdlm.core.sequence import Batch, collate, pack
from tests.models.tiny import TOLERANCE, VOCABULARY, document, tiny_model

CUTS: tuple[PromptBlocks, ...] = ("blocks", "prefix", "causal")
DOCUMENTS = [document(n, 16, seed=n) for n in (3, 9, 1)]


@torch.no_grad()
def states(batch: Batch, *, kernel: str = "sdpa", **options: Any) -> list[Tensor]:
    """Hidden states of each document of the batch, in the order of their numbers."""
    model = tiny_model(**options)
    model.config._attn_implementation = kernel
    hidden = model.hidden(batch.ids, batch)
    return [
        hidden[row][batch.document[row] == number]
        for row in range(len(batch))
        for number in range(int(batch.document[row].max()) + 1)
    ]


@pytest.mark.parametrize("cut", CUTS)
def test_packed_and_padded_documents_are_as_alone(cut: PromptBlocks) -> None:
    options = {"block_length": 4, "prompt_blocks": cut}
    alone = [states(collate([one], VOCABULARY), **options)[0] for one in DOCUMENTS]
    padded = states(collate(DOCUMENTS, VOCABULARY), **options)
    torch.testing.assert_close(padded, alone, **TOLERANCE)
    packed = states(pack(DOCUMENTS, VOCABULARY, length=80), **options)
    by_length = sorted(alone, key=len, reverse=True)
    torch.testing.assert_close(packed, by_length, **TOLERANCE)


@pytest.mark.parametrize("cut", CUTS)
def test_what_follows_a_block_has_no_part_in_its_states(cut: PromptBlocks) -> None:
    """And what is inside has one, on both sides."""
    batch = in_blocks(collate(DOCUMENTS[:1], VOCABULARY), 4, prompt=cut)
    assert batch.block is not None
    model, (number,) = tiny_model(), batch.block
    before = model.hidden(batch.ids, batch)
    for place in range(len(number)):
        ids = batch.ids.clone()
        ids[0, place] = (ids[0, place] + 1) % VOCABULARY.size
        changed = (model.hidden(ids, batch) != before).any(-1)[0]
        assert torch.equal(changed, number >= number[place])


def test_kernels_agree() -> None:
    batch = pack(DOCUMENTS, VOCABULARY, length=80)
    sdpa = states(batch, block_length=4)
    flex = states(batch, block_length=4, kernel="flex_attention")
    torch.testing.assert_close(flex, sdpa, **TOLERANCE)


@torch.no_grad()
def test_a_call_as_of_transformers_sees_the_same_blocks() -> None:
    model = tiny_model(block_length=4)
    batch = collate(DOCUMENTS[:1], VOCABULARY)
    hidden = model.hidden(batch.ids, batch)
    expected = model.logits_at(hidden, torch.ones_like(batch.target))
    torch.testing.assert_close(model(batch.ids).logits[0], expected, **TOLERANCE)
    with pytest.raises(ValueError, match="prompt_blocks 'prefix'"):
        tiny_model(block_length=4, prompt_blocks="prefix")(batch.ids)


@pytest.mark.parametrize(
    "options", [{"block_length": 0}, {"block_length": 4, "prompt_blocks": "none"}]
)
def test_a_bad_config_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"block_length must be|prompt_blocks must be"):
        tiny_model(**options)
