"""Guidance is a denoiser: two branches, one pass, uncond + scale * (cond - uncond)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sequence import Batch, collate
from tests.core.fakes import VOCABULARY, TinyDenoiser, document, ragged, with_features


def logits(denoiser, batch: Batch, x_t: torch.Tensor) -> torch.Tensor:
    return denoiser.logits_at(denoiser.hidden(x_t, batch), batch.target, ids=VOCABULARY.text)


@pytest.mark.parametrize("batch", [ragged(), with_features()], ids=["ragged", "features"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@torch.no_grad()
def test_formula(batch: Batch, scale: float):
    denoiser = TinyDenoiser()
    x_t = batch.ids.masked_fill(batch.target, VOCABULARY.mask_id)
    bare = batch.without_context(VOCABULARY)
    cond = logits(denoiser, batch, x_t)
    uncond = logits(denoiser, bare, torch.where(batch.target, x_t, bare.ids))
    denoiser.calls = 0
    guided = logits(ClassifierFreeGuidance(scale)(denoiser, batch), batch, x_t)
    torch.testing.assert_close(guided, uncond + scale * (cond - uncond))
    assert denoiser.calls == 1


def test_scale_1_is_the_denoiser_itself():
    denoiser = TinyDenoiser()
    assert ClassifierFreeGuidance(1.0)(denoiser, ragged()) is denoiser


@torch.no_grad()
def test_a_negative_prompt_is_the_other_branch():
    denoiser, batch = TinyDenoiser(), ragged()
    context = ~batch.target & ~batch.is_padding & (batch.ids < VOCABULARY.text[1])
    negative = replace(batch, ids=torch.where(context, (batch.ids + 3) % 11, batch.ids))
    x_t = batch.ids.masked_fill(batch.target, VOCABULARY.mask_id)
    guided = ClassifierFreeGuidance(2.0)(denoiser, batch, unconditional=negative)
    cond = logits(denoiser, batch, x_t)
    uncond = logits(denoiser, negative, torch.where(batch.target, x_t, negative.ids))
    torch.testing.assert_close(logits(guided, batch, x_t), 2 * cond - uncond)


def test_branches_must_have_the_same_targets():
    batch = ragged()
    other = replace(batch, target=torch.zeros_like(batch.target))
    with pytest.raises(ValueError, match="it has 0 in"):
        ClassifierFreeGuidance(2.0)(TinyDenoiser(), batch, unconditional=other)


@torch.no_grad()
def test_each_of_several_branches_counts_by_its_own_scale():
    denoiser, batch = TinyDenoiser(), ragged()
    bare = batch.without_context(VOCABULARY)
    half = replace(batch, ids=torch.where(batch.position % 2 == 0, bare.ids, batch.ids))
    x_t = batch.ids.masked_fill(batch.target, VOCABULARY.mask_id)
    cond, without_all, without_half = (
        logits(denoiser, b, torch.where(b.target, x_t, b.ids)) for b in (batch, bare, half)
    )
    guidance = ClassifierFreeGuidance((3.0, 0.5))
    guided = logits(guidance(denoiser, batch, unconditional=(bare, half)), batch, x_t)
    expected = cond + 2.0 * (cond - without_all) - 0.5 * (cond - without_half)
    torch.testing.assert_close(guided, expected)
    one = ClassifierFreeGuidance((3.0, 1.0))(denoiser, batch, unconditional=(bare, half))
    alone = ClassifierFreeGuidance(3.0)(denoiser, batch, unconditional=bare)
    assert torch.equal(logits(one, batch, x_t), logits(alone, batch, x_t))


@torch.no_grad()
def test_context_before_the_targets_may_be_of_another_length():
    denoiser = TinyDenoiser()
    batch, other = (
        collate([document(4, 3, prompt=n, seed=n) for n in lengths], VOCABULARY, length=15)
        for lengths in ((5, 2), (1, 6))
    )
    x_t = batch.ids.masked_fill(batch.target, VOCABULARY.mask_id)
    there = other.ids.masked_fill(other.target, VOCABULARY.mask_id)
    guided = ClassifierFreeGuidance(2.0)(denoiser, batch, unconditional=other)
    found = logits(guided, batch, x_t)
    expected = 2 * logits(denoiser, batch, x_t) - logits(denoiser, other, there)
    torch.testing.assert_close(found, expected)


def test_each_scale_needs_its_batch():
    batch = ragged()
    with pytest.raises(ValueError, match="2 scales .* but 1 unconditional batches"):
        ClassifierFreeGuidance((2.0, 3.0))(TinyDenoiser(), batch)
