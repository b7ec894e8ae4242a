"""The probability of a sampler's step whose order looks at the tokens that were drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmdlm.core.denoiser import Denoiser
from mmdlm.core.likelihood.token_scores import columns_of, without_columns
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import GENERATED


def step_scores(
    denoiser: Denoiser,
    x_t: Tensor,
    batch: Batch,
    *,
    committed: Tensor,
    covered: Tensor,
    full_vocabulary: bool,
    undrawable: tuple[int, ...],
    threshold: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Score a step that commits the tokens of highest probability.

    A token is drawn at each open position, all independently, and those of highest probability are
    committed, a number of them that does not depend on the draw. So the step commits the tokens
    x_i, i in S, exactly where each is drawn and what is drawn elsewhere is less probable:

        P(S, x_S) = prod_{i in S} q_i(x_i) prod_{j not in S} sum_v q_j(v) [p_j(v) < c]
        c = min_{i in S} p_i(x_i)

    with q the distribution that is drawn from, p that which the order sees, which has the mask
    token besides; of equals the one to the left is committed. Where all tokens of at least a
    threshold are committed as well, what is passed over is below that, too. Positions in S get
    log q_i(x_i), the others the logarithm of their factor. A small change of the weights leaves the
    terms of each sum what they are, so that the gradient is exact as well, save where two
    probabilities are equal.

    Args:
        denoiser: The policy.
        x_t: [B, L] ids before the step.
        batch: Its ids are the tokens that were committed.
        committed: [B, L] bool, S.
        covered: [B, L] bool, the positions to score: of S, and of those that were passed over.
        full_vocabulary: Logits over all ids, not over those of the position's modality.
        undrawable: Ids that are never drawn.
        threshold: That of `Threshold`; None: there is none.
        entropy: Whether to give the entropies of q.

    Returns:
        Scores [B, L] float32, in nats, and entropies of q, or None where they are not asked for.
    """
    vocabulary, where = denoiser.vocabulary, covered | committed
    hidden = denoiser.hidden(x_t, batch, query_mask=where)
    result = torch.zeros(x_t.shape, device=x_t.device)
    spread = torch.zeros(x_t.shape, device=x_t.device) if entropy else None
    seen = result.new_full(x_t.shape, math.inf)  # p of what was committed
    found = []
    for modality in GENERATED:
        ids = (0, vocabulary.size) if full_vocabulary else vocabulary.range(modality)
        positions = where & batch.of(modality)
        if not bool(positions.any()):
            continue
        logits = denoiser.logits_at(hidden, positions, ids=ids).float()
        unseen = tuple(i for i in undrawable if i != vocabulary.mask_id)
        log_p = without_columns(logits, columns_of(unseen, ids, x_t.device)).log_softmax(-1)
        log_q = without_columns(logits, columns_of(undrawable, ids, x_t.device)).log_softmax(-1)
        label = (batch.ids[positions] - ids[0])[:, None]
        seen = seen.masked_scatter(positions, log_p.detach().gather(-1, label).squeeze(-1))
        result = result.masked_scatter(positions, log_q.gather(-1, label).squeeze(-1))
        if spread is not None:
            value = torch.special.entr(log_q.detach().exp()).sum(-1)
            spread = spread.masked_scatter(positions, value)
        found.append((positions, log_p.detach(), log_q))

    seen = seen.masked_fill(~committed, math.inf)
    least = seen.amin(1)  # [B] the least sure of S
    column = torch.arange(x_t.shape[1], device=x_t.device)
    last = column.expand_as(seen).masked_fill(seen > least[:, None], -1).amax(1)  # [B] its place
    for positions, log_p, log_q in found:
        row, place = positions.nonzero(as_tuple=True)
        level = least[row, None]
        after = (place > last[row])[:, None]
        passed = (log_p < level) | ((log_p == level) & after)  # [M, R]
        if threshold is not None:
            passed &= log_p.exp() < threshold
        # What cannot happen gets the least probability that a number has, not none.
        factor = log_q.masked_fill(~passed, _LEAST).logsumexp(-1)
        result = torch.where(committed, result, result.masked_scatter(positions, factor))
    result = torch.where(covered, result, 0.0)
    return result, None if spread is None else torch.where(covered, spread, 0.0)


_LEAST = math.log(torch.finfo(torch.float32).tiny)
