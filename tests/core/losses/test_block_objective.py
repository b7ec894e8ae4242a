"""Block diffusion in training: a noisy and a clean copy of each row in one pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdlm.core.blocks import PromptBlocks, block_runs, doubled, hidden_beside_clean, in_blocks
from mmdlm.core.diffusion.forward import Absorbing, Corruption
from mmdlm.core.diffusion.schedule import Linear
from mmdlm.core.likelihood.distinct_rows import DistinctRows
from mmdlm.core.likelihood.elbo import Elbo
from mmdlm.core.losses.objective import Objective
from mmdlm.core.losses.timesteps import IndependentTimesteps, StratifiedTimesteps, Timesteps
from mmdlm.core.sequence import (
    Batch,
    Sequence,
    collate,
    feature_segment,
    pack,
    text_segment,
)
from mmdlm.core.vocabulary import Modality
from tests.core.fakes import VOCABULARY, document, rng
from tests.models.tiny import tiny_model

DOCUMENTS = [document(9, 8, seed=2, prompt=2), document(5, 8, seed=1, prompt=3)]
EVERYTHING = Objective(Absorbing(Linear()))


def network(**options: Any) -> Any:
    return tiny_model(vocabulary=VOCABULARY.to_dict(), **options).double()


def batches() -> dict[str, Batch]:
    return {
        "padded": collate(DOCUMENTS, VOCABULARY),
        "packed": pack(DOCUMENTS, VOCABULARY, length=50),
    }


def noisy(batch: Batch, *, share: float = 0.5) -> Tensor:
    marked = batch.target & (torch.rand(batch.ids.shape, generator=rng(5)) < share)
    return batch.ids.masked_fill(marked, VOCABULARY.mask_id)


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("cut", ["blocks", "prefix", "causal"])
@pytest.mark.parametrize("shift", [False, True])
@torch.no_grad()
def test_a_noisy_block_stands_behind_clean_ones(kind: str, cut: PromptBlocks, shift: bool) -> None:
    """As if each block had a pass of its own; with `shift` a noisy neighbor predicts its first."""
    model, batch = network(shift=shift), in_blocks(batches()[kind], 4, prompt=cut)
    x_t, run = noisy(batch), block_runs(batch)
    found = hidden_beside_clean(model, x_t, batch)
    for number in range(int(run.max()) + 1):
        here = run == number
        ids = torch.where(run < number, batch.ids, x_t)
        expected = model.hidden(ids, batch)
        if shift:  # that of the first token is the last state of the block before
            begins = here & (run.roll(1, 1) != run) & (batch.position > 0)
            here = here & ~begins
        torch.testing.assert_close(found[here], expected[here])


@torch.no_grad()
def test_only_what_is_asked_for_is_right_and_features_stand_in_both_copies() -> None:
    model = network()
    rows = [
        Sequence(
            (
                feature_segment(torch.randn(n, 32, generator=rng(n)).double(), VOCABULARY),
                text_segment([1, 2, 3, 4, 5, 6, 7][: 5 + n], target=True),
            )
        )
        for n in (1, 2)
    ]
    batch = in_blocks(collate(rows, VOCABULARY), 3)
    x_t = noisy(batch)
    whole = hidden_beside_clean(model, x_t, batch)
    read = batch.target & (x_t == VOCABULARY.mask_id)
    some = hidden_beside_clean(model, x_t, batch, query_mask=read)
    torch.testing.assert_close(some[read], whole[read])
    clean = model.hidden(batch.ids, batch)
    same = hidden_beside_clean(model, batch.ids, batch)  # nothing is noisy: both copies are alike
    torch.testing.assert_close(same[~batch.is_padding], clean[~batch.is_padding])


def all_masked(batch: Batch) -> Corruption:
    ones = torch.ones(batch.ids.shape)
    x_t = batch.ids.masked_fill(batch.target, VOCABULARY.mask_id)
    return Corruption(x_t, batch.target, batch.target, ones, ones, ones, ones, block=batch.block)


@torch.no_grad()
def test_blocks_of_one_token_give_the_autoregressive_loss() -> None:
    """Token by token: the mask behind what is written so far."""
    model = network(block_length=1)
    batch = model.in_blocks(collate(DOCUMENTS, VOCABULARY))
    terms = EVERYTHING.terms(model, batch, all_masked(batch))
    expected = {"text": 0.0, "image": 0.0}
    for row, place in batch.target.nonzero().tolist():
        one = batch.rows(torch.tensor([row]))
        ids = one.ids.clone()
        ids[0, place] = VOCABULARY.mask_id
        here = torch.zeros_like(one.target)
        here[0, place] = True
        name = "text" if batch.modality[row, place] == Modality.TEXT else "image"
        start, stop = VOCABULARY.text if name == "text" else VOCABULARY.image
        logits = model.logits_at(model.hidden(ids, one), here, ids=(start, stop))
        expected[name] -= float(logits.log_softmax(-1)[0, batch.ids[row, place] - start])
    for name, value in expected.items():
        count = int(terms.counts[name])
        assert float(terms.sums[name]) / count == pytest.approx(value / count, abs=1e-6)


def test_a_block_as_long_as_the_row_gives_the_masked_loss() -> None:
    """Gradients, too."""
    for batch in batches().values():
        corruption = EVERYTHING.corrupt(batch, VOCABULARY, generator=rng())
        found = []
        for lengths in ((), (100,)):
            model, objective = network(), replace(EVERYTHING, block_lengths=lengths)
            cut = objective._in_blocks(batch, generator=rng())
            terms = objective.terms(model, batch, replace(corruption, block=cut.block))
            sum(terms.sums.values()).backward()  # type: ignore[union-attr]
            found.append((terms.sums, [p.grad for p in model.parameters() if p.grad is not None]))
        torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("complementary", [False, True])
def test_blocks_are_drawn_for_each_batch(complementary: bool) -> None:
    objective = Objective(
        Absorbing(Linear()),
        block_lengths=(2, 5),
        complementary=complementary,
        times=StratifiedTimesteps("block"),
    )
    batch, seen = batches()["padded"], set()
    for seed in range(8):
        corruption = objective.corrupt(batch, VOCABULARY, generator=rng(seed))
        assert corruption.block is not None
        assert len(corruption.block) == len(corruption.x_t) == (1 + complementary) * len(batch)
        (length,) = (n for n in (2, 5) if torch.equal(corruption.block[:2], batch.position // n))
        seen.add(length)
    assert seen == {2, 5}
    if complementary:
        first, second = corruption.loss_mask.chunk(2)
        assert torch.equal(first ^ second, batch.target)
    terms = objective.terms(network(), batch, corruption)
    assert all(bool(one.isfinite()) for one in terms.sums.values())


@pytest.mark.parametrize("times", [IndependentTimesteps, StratifiedTimesteps])
def test_a_block_has_one_time_and_times_are_clipped(times: type[Timesteps]) -> None:
    batch = in_blocks(batches()["packed"], 4)
    t = times("block", low=0.3, high=0.8)(batch, generator=rng())
    run = block_runs(batch)
    drawn = [t[run == number].unique() for number in range(int(run.max()) + 1)]
    filled = [bool(batch.target[run == number].any()) for number in range(int(run.max()) + 1)]
    for one, has_targets in zip(drawn, filled, strict=True):
        assert len(one) == 1
        assert (0.3 <= float(one) <= 0.8) if has_targets else float(one) == 0
    assert len({float(one) for one in drawn}) > sum(filled) // 2


def test_a_model_of_block_diffusion_learns_and_is_scored_so() -> None:
    """Without a word in the objective; the bound of a document is that of its blocks."""
    model, batch = network(block_length=4), batches()["padded"]
    corruption = EVERYTHING.corrupt(model.in_blocks(batch), VOCABULARY, generator=rng())
    here = corruption.loss_mask
    assert torch.equal(
        EVERYTHING.terms(model, batch, corruption).sums["text"],
        EVERYTHING.terms(model, batch, replace(corruption, block=None)).sums["text"],
    )
    hidden = hidden_beside_clean(model, corruption.x_t, batch, query_mask=here)
    assert not torch.allclose(hidden[here], model.hidden(corruption.x_t, batch)[here])
    bound = Elbo()(model, batch, generator=rng())
    torch.testing.assert_close(Elbo()(DistinctRows(model), batch, generator=rng()), bound)
    assert not torch.allclose(Elbo()(without_blocks(model), batch, generator=rng()), bound)


def without_blocks(model: Any) -> Any:
    """The same weights without blocks."""
    free = network()
    free.load_state_dict(model.state_dict())
    return free


def test_what_cannot_be_is_said() -> None:
    batch = batches()["padded"]
    with pytest.raises(ValueError, match="times per block need a batch in blocks"):
        StratifiedTimesteps("block")(batch, generator=rng())
    with pytest.raises(ValueError, match=r"low 0.8 and high 0.3 must be a range"):
        StratifiedTimesteps(low=0.8, high=0.3)
    with pytest.raises(ValueError, match="block_length must be a whole number of at least 1"):
        Objective(Absorbing(Linear()), block_lengths=(0,))
    with pytest.raises(ValueError, match="has no clean copy"):
        doubled(batch)
    ahead = replace(in_blocks(batch, 4), lookahead=torch.zeros(len(batch), dtype=torch.int64))
    with pytest.raises(ValueError, match="do not go with a bounded lookahead"):
        doubled(ahead)
    with pytest.raises(ValueError, match="exclude each other; prompt_blocks 'prefix'"):
        network(block_length=4, prefix_attention=True)
