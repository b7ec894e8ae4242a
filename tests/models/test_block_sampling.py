"""Sampling block after block: the cache of finished blocks is exact, and grows with the text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdlm.core.blocks import PromptBlocks, first_columns, in_blocks
from mmdlm.core.diffusion.schedule import Cosine
from mmdlm.core.kv_cache import KVCache
from mmdlm.core.sampling import forward_passes
from mmdlm.core.sampling.block_rules import BlockTransfer
from mmdlm.core.sampling.cache import FinishedBlocks
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import Confidence, Entropy, LeftToRight, Random
from mmdlm.core.sampling.remasking import Remasking
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import EntropyBound, ScheduledTransfer, Threshold
from mmdlm.core.sequence import Batch, Sequence, collate, text_segment
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from tests.core.fakes import VOCABULARY, document, rng
from tests.models.tiny import tiny_model

BLOCK = 4


def network(**options: Any) -> MmdlmForMaskedDiffusion:
    options = {"block_length": BLOCK, "num_hidden_layers": 3, **options}
    return tiny_model(vocabulary=VOCABULARY.to_dict(), **options).double()


def prompts(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = rng(seed)
    return [torch.randint(*VOCABULARY.text, (n,), generator=generator) for n in lengths]


def answers(*lengths: int, new: int = 14, cut: PromptBlocks = "blocks", seed: int = 0) -> Batch:
    """Rows of ragged prompts, each followed by `new` open tokens."""
    hole = torch.zeros(new, dtype=torch.int64)
    rows = [
        Sequence((text_segment(ids), text_segment(hole, target=True)))
        for ids in prompts(*lengths, seed=seed)
    ]
    return in_blocks(collate(rows, VOCABULARY), BLOCK, prompt=cut)


def check_exact(
    sampler: Sampler, model: MmdlmForMaskedDiffusion, batch: Batch, **given: Any
) -> Tensor:
    """The same tokens, at the same steps, as with everything computed anew; they are returned."""
    forward_passes._GROWTH, growth = 5, forward_passes._GROWTH  # so that short rows grow
    try:
        anew = sampler(model, batch, generator=rng(), **given)
        kept = replace(sampler, cache=FinishedBlocks())(model, batch, generator=rng(), **given)
    finally:
        forward_passes._GROWTH = growth
    assert torch.equal(kept.ids, anew.ids)
    assert torch.equal(kept.steps, anew.steps)
    torch.testing.assert_close(kept.log_prob, anew.log_prob, atol=1e-5, rtol=0)
    return kept.ids


RULES: dict[str, dict[str, Any]] = {
    "uniform": {"steps": 12},
    "one step": {"steps": 1, "steps_per_block": True},
    "threshold": {"steps": 16, "unmasking": Threshold(0.2)},
    "published": {
        "steps": 4,
        "steps_per_block": True,
        "unmasking": Threshold(0.3, fallback=BlockTransfer(BLOCK)),
    },
    "cosine": {"steps": 14, "unmasking": ScheduledTransfer(Cosine()), "order": Random()},
    "entropy": {"steps": 16, "unmasking": EntropyBound(0.5), "order": Entropy()},
    "drawn": {"steps": 16, "temperature": 1.0, "top_k": 5, "order": LeftToRight()},
    "pieces": {"steps": 16, "block_length": 2},
    "remasked": {
        "steps": 30,
        "remask": Remasking(0.5),
        "unmasking": ScheduledTransfer(Cosine()),
        "temperature": 1.0,
    },
    "masks drawn": {"steps": 16, "allow_mask_token": True, "full_vocabulary": True},
}


@pytest.mark.parametrize("rule", RULES)
def test_it_is_exact_for_ragged_rows(rule: str) -> None:
    check_exact(Sampler(**RULES[rule]), network(), answers(3, 13, 8, 1))


@pytest.mark.parametrize("cut", ["blocks", "prefix", "causal"])
@pytest.mark.parametrize("shift", [False, True])
def test_it_is_exact_however_prompts_are_cut(cut: PromptBlocks, shift: bool) -> None:
    check_exact(Sampler(16), network(shift=shift), answers(3, 13, 8, cut=cut))


def test_rows_that_are_alike_and_images_are_exact() -> None:
    batch = answers(5, 2)
    check_exact(Sampler(16, temperature=1.0), network(), batch.rows(torch.tensor([0, 1, 0, 0])))
    both = [document(5, 8, seed=1, prompt=3), document(9, 0, seed=2, prompt=2)]
    check_exact(Sampler(20), network(), in_blocks(collate(both, VOCABULARY), BLOCK))


def test_it_is_exact_under_guidance() -> None:
    """Also where the prompt of the other branch is of another length."""
    sampler, batch = Sampler(16, guidance=ClassifierFreeGuidance(1.7)), answers(3, 13, 8)
    check_exact(sampler, network(), batch)
    other = answers(6, 1, 4, seed=3)
    width = batch.ids.shape[1]
    hole = torch.zeros(14, dtype=torch.int64)
    rows = [
        Sequence((text_segment(ids), text_segment(hole, target=True)))
        for ids in prompts(6, 1, 4, seed=3)
    ]
    other = in_blocks(collate(rows, VOCABULARY, length=width), BLOCK)
    check_exact(sampler, network(), batch, unconditional=other)


def test_a_row_in_a_batch_is_as_alone() -> None:
    lengths = (3, 13, 8)
    sampler = Sampler(4, steps_per_block=True, unmasking=Threshold(0.3), cache=FinishedBlocks())
    model, batch = network(), answers(*lengths)
    together = sampler(model, batch, generator=rng()).ids
    for row, length in enumerate(lengths):
        alone = batch.rows(torch.tensor([row]))
        alone = first_columns(alone, length + 14)
        found = sampler(model, alone, generator=rng()).ids[0]
        assert torch.equal(together[row, : length + 14], found)


def test_an_end_of_text_ends_the_row() -> None:
    """The other rows go on; what would follow is never computed."""
    model, batch = network(), answers(3, 13, 8)
    sampler = Sampler(4, steps_per_block=True, order=LeftToRight())
    whole = check_exact(sampler, model, batch)
    stop = int(whole[0, 3 + 5])  # in the second block of the answer
    short = check_exact(replace(sampler, stop_ids=(stop,)), model, batch)
    first = int((whole[0, 3:] == stop).nonzero()[0]) + 3
    assert torch.equal(short[0, : first + 1], whole[0, : first + 1])
    end = (first // BLOCK + 1) * BLOCK
    assert (short[0, end:17] == VOCABULARY.mask_id).all()


class Counting:
    """A denoiser that keeps how many columns and how many tokens each pass has."""

    def __init__(self, model: MmdlmForMaskedDiffusion) -> None:
        self.model, self.vocabulary = model, model.vocabulary
        self.columns: list[int] = []
        self.tokens: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def hidden(
        self, x_t: Tensor, batch: Batch, *, query_mask: Tensor, kv_cache: KVCache | None = None
    ) -> Tensor:
        self.columns.append(x_t.shape[1])
        self.tokens.append(int(query_mask.sum()))
        return self.model.hidden(x_t, batch, query_mask=query_mask, kv_cache=kv_cache)


def test_finished_blocks_leave_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step computes one block, the first of a block two; there is no canvas."""
    monkeypatch.setattr(forward_passes, "_GROWTH", 1)
    counting = Counting(network())
    sampler = Sampler(2, steps_per_block=True, cache=FinishedBlocks())
    sampler(counting, answers(8, new=12), generator=rng())  # type: ignore[arg-type]
    assert counting.tokens == [12, 4, 8, 4, 8, 4]
    assert counting.columns == [12, 12, 16, 16, 20, 20]


def test_quotas_are_of_whole_blocks() -> None:
    """The first block of an answer may begin with a part of the prompt."""
    counting = Counting(network())
    unmasking = BlockTransfer(BLOCK)
    sampler = Sampler(2, steps_per_block=True, unmasking=unmasking, cache=FinishedBlocks())
    steps = sampler(counting, answers(5, new=7), generator=rng()).steps  # type: ignore[arg-type]
    assert [int((steps == step).sum()) for step in range(4)] == [2, 1, 2, 2]


def test_what_does_not_fit_is_said() -> None:
    uncut = replace(answers(3), block=None)
    with pytest.raises(ValueError, match="is not cut into blocks"):
        Sampler(16, cache=FinishedBlocks())(network(block_length=None), uncut, generator=rng())
    with pytest.raises(ValueError, match="refresh 4 would only cost"):
        FinishedBlocks(4)
    with pytest.raises(ValueError, match="3 steps are too few for 5 blocks; raise steps"):
        Sampler(3)(network(), answers(3), generator=rng())
    with pytest.raises(ValueError, match="block_length must be at least 1, got 0"):
        BlockTransfer(0)


def test_order_is_kept_by_default() -> None:
    """No block begins before the one before it is finished."""
    batch = answers(3, 13)
    out = Sampler(16, order=Confidence())(network(), batch, generator=rng())
    assert batch.block is not None
    for row in range(2):
        target = batch.target[row]
        block, steps = batch.block[row][target], out.steps[row][target]
        for number in block.unique().tolist()[1:]:
            assert steps[block < number].max() < steps[block == number].min()
