"""What a denoiser says of the clean tokens at masked positions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.blocks import hidden_beside_clean
from mmdlm.core.denoiser import Denoiser
from mmdlm.core.losses.fused_cross_entropy import linear_log_prob
from mmdlm.core.sequence import Batch
from mmdlm.core.vocabulary import GENERATED


@dataclass(frozen=True)
class TokenScores:
    """What a denoiser says of the covered tokens of K views; all [K, B, L], 0 where not covered.

    Attributes:
        log_prob: Of the clean token, in nats, differentiable; not weighted.
        covered: bool, as in `NoisyView`.
        weight: As in `NoisyView`.
        entropy: Of the distribution that the clean token was looked up in, without gradient; or
            None.
    """

    log_prob: Tensor
    covered: Tensor
    weight: Tensor
    entropy: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """[B, L], the weighted sum over the views: the estimate, token by token."""
        return (self.weight * self.log_prob).sum(0)

    @property
    def anywhere(self) -> Tensor:
        """[B, L] bool, targets that some view covers."""
        return self.covered.any(0)

    def detach(self) -> TokenScores:
        """Return the same scores without gradient, to keep as those of the old policy."""
        return replace(self, log_prob=self.log_prob.detach())


def token_log_prob(
    denoiser: Denoiser, x_t: Tensor, batch: Batch, *, where: Tensor, full_vocabulary: bool = False
) -> Tensor:
    """Return log p(x_0 | x_t) at the positions `where`, 0 elsewhere; [B, L] float32.

    Logits are restricted to the id range of each position's modality unless `full_vocabulary`.
    """
    return token_scores(denoiser, x_t, batch, where=where, full_vocabulary=full_vocabulary)[0]


def token_scores(
    denoiser: Denoiser,
    x_t: Tensor,
    batch: Batch,
    *,
    where: Tensor,
    full_vocabulary: bool = False,
    entropy: bool = False,
    without: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor | None]:
    """Return `token_log_prob`, and where asked the entropy at the same positions.

    Args:
        denoiser: The policy, or another model.
        x_t: [B, L] int64, noisy ids.
        batch: Clean ids and layout.
        where: [B, L] bool, the tokens to score.
        full_vocabulary: Normalize over all ids, not over the range of the position's modality.
        entropy: Whether to compute the entropies.
        without: Ids that have no probability.

    Returns:
        Log-probabilities [B, L], 0 elsewhere, and entropies [B, L] without gradient, or None.
    """
    hidden = hidden_beside_clean(denoiser, x_t, batch, query_mask=where)
    head, something = denoiser.head_weight(), bool(where.any())
    result = torch.zeros(x_t.shape, device=x_t.device)
    spread = torch.zeros(x_t.shape, device=x_t.device) if entropy else None
    for modality in GENERATED:
        start, stop = denoiser.vocabulary.range(modality)
        if start == stop:
            continue
        ids = (0, denoiser.vocabulary.size) if full_vocabulary else (start, stop)
        positions = where & batch.of(modality)
        label = batch.ids[positions] - ids[0]
        if not len(label) and something:  # its gradients, all zero, are as large as the head
            continue
        columns = columns_of(without, ids, x_t.device)
        if head is not None:
            found = linear_log_prob(
                hidden[positions], head, label, ids=ids, entropy=entropy, without=columns
            )
        else:
            logits = denoiser.logits_at(hidden, positions, ids=ids)
            found = _log_prob(without_columns(logits, columns), label, entropy=entropy)
        log_prob, value = found
        result = result.masked_scatter(positions, log_prob)
        if spread is not None and value is not None:
            spread = spread.masked_scatter(positions, value)
    return result, spread


def columns_of(ids: tuple[int, ...], among: tuple[int, int], device: torch.device) -> Tensor | None:
    """Return the columns [n] of some ids in logits over the ids `among`; None: there are none."""
    columns = [i - among[0] for i in dict.fromkeys(ids) if among[0] <= i < among[1]]
    return torch.tensor(columns, device=device) if columns else None


def without_columns(logits: Tensor, columns: Tensor | None) -> Tensor:
    """Return logits [M, R] that give no probability to some columns."""
    return logits if columns is None else logits.index_fill(-1, columns, -torch.inf)


def _log_prob(logits: Tensor, label: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """`linear_log_prob` of logits [M, R]."""
    logits = logits.float()
    log_prob = -F.cross_entropy(logits, label, reduction="none")
    if not entropy:
        return log_prob, None
    return log_prob, torch.special.entr(logits.detach().softmax(-1)).sum(-1)
