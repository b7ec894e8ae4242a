"""The published algorithms in a few plain lines each: what `eval.speed.benchmark` compares with.

Written from their descriptions; each computes all logits at all positions, as the published code
does, and gives the very tokens or the very loss that the fast path has to give.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdlm.core.diffusion.forward import Corruption
from mmdlm.core.kernels.linear import Linear
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import Modality
from mmdlm.models.modeling import MmdlmForMaskedDiffusion


def in_torchs_layers(model: MmdlmForMaskedDiffusion) -> MmdlmForMaskedDiffusion:
    """Return the same parameters in torch's linear layers, which published code is made of."""
    twin = copy.deepcopy(model, {id(one): one for one in model.parameters()})
    ours: list[nn.Module] = [layer for layer in twin.modules() if type(layer) is Linear]
    for layer in ours:
        layer.__class__ = nn.Linear
    return twin


@torch.no_grad()
def text(model: MmdlmForMaskedDiffusion, batch: Batch, *, steps: int, block_length: int) -> Tensor:
    """LLaDA's low-confidence re-masking, greedily: [B, L] ids. The targets end each row.

    Source: published code of arXiv:2502.09992 (generate.py): float64 softmax over all positions and
    all ids. Ids outside the text range are left out, so that the result can be compared.
    """
    mask = model.vocabulary.mask_id
    start, stop = model.vocabulary.text
    x = batch.ids.masked_fill(batch.target, mask)
    first = int(batch.target[0].nonzero()[0])
    blocks = (x.shape[1] - first) // block_length
    for block in range(blocks):
        end = first + (block + 1) * block_length
        for _ in range(steps // blocks):
            open_ = x == mask
            logits = model(x).logits  # [B, L, V]
            logits[..., :start] = logits[..., stop:] = -math.inf
            token = logits.argmax(-1)
            p = F.softmax(logits.to(torch.float64), dim=-1)
            confidence = p.gather(-1, token[..., None]).squeeze(-1)
            confidence[:, end:] = -math.inf
            confidence = torch.where(open_, confidence, -math.inf)
            left = block_length // (steps // blocks)
            for row in range(len(x)):
                chosen = confidence[row].topk(left).indices
                x[row, chosen] = token[row, chosen]
    return x


@torch.no_grad()
def image(
    model: MmdlmForMaskedDiffusion, batch: Batch, *, steps: int, guidance_scale: float
) -> Tensor:
    """MaskGIT's loop under guidance, greedily, as MMaDA draws: [B, L] ids.

    Source: published code of arXiv:2505.15809 (t2i_generate): both branches through the whole
    vocabulary, then the range of the codes.
    """
    mask = model.vocabulary.mask_id
    start, stop = model.vocabulary.image
    target = batch.target
    count = int(target[0].sum())
    x = batch.ids.masked_fill(target, mask)
    empty = batch.without_context(model.vocabulary).ids
    for step in range(steps):
        both = torch.cat([x, torch.where(target, x, empty)])
        cond, uncond = model(both).logits.chunk(2)  # [B, L, V]
        logits = (uncond + guidance_scale * (cond - uncond))[..., start:stop]
        p = logits.softmax(-1)
        token = logits.argmax(-1)
        known = x != mask
        sure = p.gather(-1, token[..., None]).squeeze(-1).masked_fill(known, math.inf)
        x = torch.where(target & ~known, token + start, x)
        if step == steps - 1:
            break
        left = count * torch.cos(torch.tensor(0.5 * math.pi * (step + 1) / steps))
        least = (~known & target)[0].sum() - 1
        again = int(torch.minimum(torch.floor(left), least).clamp_min(1))
        for row in range(len(x)):
            x[row, sure[row].argsort(stable=True)[:again]] = mask
    return x


def loss(
    model: MmdlmForMaskedDiffusion, batch: Batch, corruption: Corruption, modality: Modality
) -> Tensor:
    """All logits, then those of masked tokens: the bound's sum, as MMaDA and LLaDA index it."""
    start, stop = model.vocabulary.range(modality)
    attention_mask = (~batch.is_padding).long()
    logits = model(corruption.x_t, attention_mask).logits  # [B, L, V]
    chosen = logits[corruption.is_noised][:, start:stop].float()
    label = batch.ids[corruption.is_noised] - start
    losses = F.cross_entropy(chosen, label, reduction="none")
    return (corruption.weight[corruption.is_noised] * losses).sum()
