"""Whether a sampler that takes the surest token of each step writes the targets of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.likelihood.token_scores import columns_of, without_columns
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import GENERATED


@torch.no_grad()
def is_greedy(denoiser: Denoiser, batch: Batch) -> Tensor:
    """Whether `Sampler(steps=number of targets)` fills the targets of each row as they are.

    That sampler commits one token a step, of all open targets the surest one, and it draws the most
    likely token. A row whose sampler would commit another token is given up at once, so that
    unlikely targets cost one forward pass.

    Args:
        denoiser: Predicts the tokens.
        batch: Clean ids and targets; rows hold one document.

    Returns:
        [B] bool on the CPU.

    Source: arXiv:2502.09992, its published evaluation (`suffix_greedy_prediction`).
    """
    mask_id = denoiser.vocabulary.mask_id
    result = torch.ones(len(batch), dtype=torch.bool)
    rows = torch.arange(len(batch))  # that agree so far
    unknown = batch.target.clone()
    while len(rows) and bool(unknown.any()):
        label = batch.ids
        sure, token = _surest(denoiser, label.masked_fill(unknown, mask_id), batch, unknown)
        place = sure.argmax(1, keepdim=True)  # [B, 1], the first of equals
        finished = ~unknown.any(1)
        agrees = (finished | (token.gather(1, place) == label.gather(1, place))[:, 0]).cpu()
        result[rows[~agrees]] = False
        unknown = unknown.scatter(1, place, False)
        kept = agrees.nonzero()[:, 0]
        rows, unknown, batch = rows[kept], unknown[kept.to(unknown.device)], batch.rows(kept)
    return result


def _surest(denoiser: Denoiser, x_t: Tensor, batch: Batch, where: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of the most likely token and that token, both [B, L].

    Positions outside of `where` get -inf.
    """
    hidden = denoiser.hidden(x_t, batch, query_mask=where)
    sure = torch.full(x_t.shape, -torch.inf, device=x_t.device)
    token = torch.zeros_like(x_t)
    for modality in GENERATED:
        positions = where & batch.of(modality)
        if not bool(positions.any()):
            continue
        ids = denoiser.vocabulary.range(modality)
        logits = denoiser.logits_at(hidden, positions, ids=ids).float()
        masks = columns_of((denoiser.vocabulary.mask_id,), ids, x_t.device)
        best, index = without_columns(logits.log_softmax(-1), masks).max(-1)
        sure = sure.masked_scatter(positions, best)
        token = token.masked_scatter(positions, index + ids[0])
    return sure, token
