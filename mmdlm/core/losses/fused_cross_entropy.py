"""What losses read of a linear head, in chunks of rows, so that all logits never exist at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdlm.core.kernels.linear import linear

Ids = tuple[int, int]


def linear_cross_entropy(
    states: Tensor,
    head: Tensor,
    label: Tensor,
    factor: Tensor,
    *,
    ids: Ids | None = None,
) -> Tensor:
    """Compute sum_i factor_i * -log softmax(head states_i)[label_i] without all logits at once.

    The gradients of states and head are taken along the way, while the logits of a chunk are there:
    three matrix products as with all logits at once, and the memory of one chunk. Under autocast
    the products are in its dtype; softmax and sums are in float32.

    Args:
        states: [M, D].
        head: [V, D].
        label: [M] int64, counted from the first of the rows `ids`.
        factor: [M], without gradient.
        ids: Half-open range of the head's rows that there are logits of; None: all.

    Returns:
        A float32 scalar.

    Source: the order of computation is that of Liger Kernel (arXiv:2410.10989), where token losses
    have no factor. It serves GPUs too: cut-cross-entropy (arXiv:2411.09009) saves the chunk, but
    takes only states in 16 bits and computes the logits once more.
    """
    states, dtype = _cast(states, head)
    total: Tensor = _LinearCrossEntropy.apply(
        states,
        head,
        label,
        factor.detach().float(),
        ids or (0, len(head)),
        dtype,
        torch.is_grad_enabled(),
    )
    return total


def linear_log_prob(
    states: Tensor,
    head: Tensor,
    label: Tensor,
    *,
    ids: Ids | None = None,
    entropy: bool = False,
    without: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return log softmax(head states_i)[label_i], [M]; arguments as in `linear_cross_entropy`.

    With it, where asked, the entropies [M] of the softmax, without gradient. `without` are columns
    of the logits that have no probability.

    For losses that are no sum over tokens, such as ratios of a policy and its old self. What comes
    back to each token is not known while its logits are there, so that they are computed once more
    only for the gradient of the head: that of the states is so many times a vector
    that is known.
    """
    states, dtype = _cast(states, head)
    log_prob, spread = _LinearLogProb.apply(
        states, head, label, ids or (0, len(head)), dtype, torch.is_grad_enabled(), entropy, without
    )
    return log_prob, spread


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Tensor,
        label: Tensor,
        factor: Tensor,
        ids: Ids,
        dtype: torch.dtype,
        learning: bool,
    ) -> Tensor:
        total, of_states, of_head = _summed(
            states,
            head,
            label,
            factor,
            ids,
            dtype,
            for_states=learning and states.requires_grad,
            for_head=learning and head.requires_grad,
        )
        ctx.ids = ids
        ctx.save_for_backward(of_states, of_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        of_states, of_head = ctx.saved_tensors
        # What is kept can be given away as it lies, unless somebody will come for it again.
        if torch._C._autograd._get_current_graph_task_keep_graph():
            of_states, of_head = (None if x is None else x.clone() for x in (of_states, of_head))
        if of_states is not None:
            of_states.mul_(slope)
        if of_head is not None:
            of_head[slice(*ctx.ids)].mul_(slope)  # all else is zero
        return of_states, of_head, *[None] * 5


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Tensor,
        label: Tensor,
        ids: Ids,
        dtype: torch.dtype,
        learning: bool,
        entropy: bool,
        without: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        found = torch.empty(len(states), device=states.device)
        spread = torch.empty_like(found) if entropy else None
        of_states = torch.empty_like(states) if learning and states.requires_grad else None
        own = head[slice(*ids)].to(dtype)
        for chunk in _chunks(states, own):
            wanted = label[chunk, None]
            log_prob, share, sum_ = _softmax(states[chunk], own, wanted, without)
            found[chunk] = log_prob.squeeze(1)
            if spread is not None:  # of p = share / sum_
                spread[chunk] = torch.special.entr(share).sum(1) / sum_[:, 0] + sum_[:, 0].log()
            if of_states is not None:
                slope = _slope(share, sum_, wanted, -torch.ones_like(sum_)).to(states.dtype)
                of_states[chunk] = linear(slope, own.T)
                del slope
            del share
        again = (states, head, label) if ctx.needs_input_grad[1] else (None,) * 3
        ctx.ids, ctx.dtype, ctx.without = ids, dtype, without
        ctx.save_for_backward(of_states, *again)
        if spread is not None:
            ctx.mark_non_differentiable(spread)
        return found, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        of_states, states, head, label = ctx.saved_tensors
        if of_states is not None:
            of_states = of_states * slope[:, None]
        of_head = None
        if head is not None:
            _, _, of_head = _summed(
                states,
                head,
                label,
                -slope,
                ctx.ids,
                ctx.dtype,
                for_states=False,
                for_head=True,
                without=ctx.without,
            )
        return of_states, of_head, *[None] * 6


def _summed(
    states: Tensor,
    head: Tensor,
    label: Tensor,
    factor: Tensor,
    ids: Ids,
    dtype: torch.dtype,
    *,
    for_states: bool,
    for_head: bool,
    without: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """sum_i factor_i * -log p_i, and its gradients by the states and by the head; None: not asked.

    Args:
        states: [M, D].
        head: [V, D].
        label: [M] int64, counted from the first of the rows `ids`.
        factor: [M].
        ids: Half-open range of the head's rows.
        dtype: Of the products.
        for_states: Whether the gradient by the states is wanted.
        for_head: Whether the gradient by the head is wanted.
        without: Columns that have no probability, if any.
    """
    of_states = torch.empty_like(states) if for_states else None
    # As large as the head, so there is one of it, from the first sum to the optimizer.
    of_head = torch.zeros_like(head) if for_head else None
    sum_of_head = None if of_head is None else of_head[slice(*ids)].float()  # a view, mostly
    own = head[slice(*ids)].to(dtype)
    total = torch.zeros((), device=states.device)
    for chunk in _chunks(states, own):
        some, wanted, weight = states[chunk], label[chunk, None], factor[chunk, None]
        log_prob, share, sum_ = _softmax(some, own, wanted, without)
        total -= (weight * log_prob).sum()
        if for_states or for_head:
            slope = _slope(share, sum_, wanted, weight).to(states.dtype)
            if of_states is not None:
                of_states[chunk] = linear(slope, own.T)
            if sum_of_head is not None:
                _add_product(sum_of_head, slope.T, some)
            del slope
        del share  # before the next ones are made
    if of_head is not None and sum_of_head is not None and of_head.dtype != sum_of_head.dtype:
        of_head[slice(*ids)] = sum_of_head
    return total, of_states, of_head


def _cast(states: Tensor, head: Tensor) -> tuple[Tensor, torch.dtype]:
    """Return the states as products need them, and the dtype for the head under autocast."""
    kind = states.device.type
    if not torch.is_autocast_enabled(kind):
        return states, head.dtype
    dtype = torch.get_autocast_dtype(kind)
    return states.to(dtype), dtype


def _chunks(states: Tensor, head: Tensor) -> Iterator[slice]:
    """As many rows of the states as may have logits at once, again and again."""
    rows = _rows(len(head), states.device.type)
    for start in range(0, len(states), rows):
        yield slice(start, start + rows)


def _rows(ids: int, kind: str) -> int:
    """How many have logits at once: 256 MB of them in float32, on a CPU as many as caches like.

    There products like 32 times some number of rows: of 126,464 ids 132 take 5 % longer than 256,
    and 265 take 20 %.
    """
    if kind != "cpu":
        return max(1, (1 << 26) // max(1, ids))
    return max(256, (1 << 22) // max(1, ids) // 32 * 32)


def _softmax(
    states: Tensor, head: Tensor, wanted: Tensor, without: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[m, D], [R, D], [m, 1] -> log p of the wanted ids [m, 1]; p [m, R] times its sum [m, 1]."""
    logits = linear(states, head).float()
    if without is not None:
        logits.index_fill_(1, without, -torch.inf)
    own = logits.gather(1, wanted)
    most = logits.amax(1, keepdim=True)
    share = logits.sub_(most).exp_()  # in place
    sum_ = share.sum(1, keepdim=True)
    return own - most - sum_.log(), share, sum_


def _slope(share: Tensor, sum_: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Replace the shares by the derivative of -weight [m, 1] * log p[wanted] by the logits."""
    return share.mul_(weight / sum_).scatter_add_(1, wanted, -weight)


def _add_product(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    """sum_ += a @ b, in float32."""
    if a.dtype == torch.float32:
        sum_.addmm_(a, b)
    else:
        sum_.add_(a @ b)
