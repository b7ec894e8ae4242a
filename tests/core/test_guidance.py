"""Guidance is a denoiser: two branches, one pass, uncond + scale * (cond - uncond)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmdlm.core.guidance import ClassifierFreeGuidance
from mmdlm.core.sequence import Batch
from tests.core.fakes import VOCABULARY, TinyDenoiser, ragged, with_features


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
