"""Cross-entropy of a linear head, in chunks of rows, so that all logits never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdlm.core.linear import linear

# Logits at a time: on a GPU 256 MB in float32, elsewhere a quarter of it, nearer to the caches.
_CHUNK_ON_GPU, _CHUNK = 1 << 26, 1 << 24


def linear_cross_entropy(
    states: Tensor,
    head: Tensor,
    label: Tensor,
    factor: Tensor,
    *,
    ids: tuple[int, int] | None = None,
) -> Tensor:
    """sum_i factor_i * -log softmax(head states_i)[label_i], a float32 scalar.

    states  [M, D]
    head    [V, D]
    label   [M] int64, counted from the first of the rows `ids`
    factor  [M], without gradient
    ids     half-open range of the head's rows that there are logits of; None: all

    The gradients of states and head are taken along the way, while the logits of a chunk are there:
    three matrix products as with all logits at once, and the memory of one chunk. Under autocast
    the products are in its dtype; softmax and sums are in float32.

    Source: the order of computation is that of Liger Kernel (arXiv:2410.10989), where token losses
    have no factor.
    """
    kind, dtype = states.device.type, head.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        states = states.to(dtype)
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


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Tensor,
        label: Tensor,
        factor: Tensor,
        ids: tuple[int, int],
        dtype: torch.dtype,
        learning: bool,
    ) -> Tensor:
        for_states = learning and states.requires_grad
        for_head = learning and head.requires_grad
        ctx.shape, ctx.ids, ctx.dtype = head.shape, ids, head.dtype
        head = head[slice(*ids)].to(dtype)
        of_states = torch.empty_like(states) if for_states else None
        of_head = None
        rows = max(1, (_CHUNK_ON_GPU if states.is_cuda else _CHUNK) // max(1, len(head)))
        total = torch.zeros((), device=states.device)
        for start in range(0, len(states), rows):
            here = slice(start, start + rows)
            some, wanted, weight = states[here], label[here, None], factor[here, None]
            logits = linear(some, head).float()
            own = logits.gather(1, wanted)
            most = logits.amax(1, keepdim=True)
            share = logits.sub_(most).exp_()  # in place from here on
            sum_ = share.sum(1, keepdim=True)
            total += (weight * (most + sum_.log() - own)).sum()
            if not for_states and not for_head:
                continue
            slope = share.mul_(weight / sum_).scatter_add_(1, wanted, -weight).to(states.dtype)
            if of_states is not None:
                of_states[here] = linear(slope, head.T)
            if for_head:
                of_head = _sum_of_products(of_head, slope.T, some)
        if for_head and of_head is None:  # there are no states
            of_head = torch.zeros_like(head)
        ctx.save_for_backward(of_states, None if of_head is None else of_head.to(dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        of_states, of_head = ctx.saved_tensors
        if of_states is not None:
            of_states = of_states * slope.to(of_states.dtype)
        if of_head is not None:
            # As large as the head, which is why it is written once, and where it is to lie.
            start, stop = ctx.ids
            whole = of_head.new_empty(ctx.shape, dtype=ctx.dtype)
            whole[:start] = whole[stop:] = 0
            torch.mul(of_head, slope, out=whole[start:stop])
            of_head = whole
        return of_states, of_head, *[None] * 5


def _sum_of_products(known: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """known + a @ b, the sum in float32 and in place."""
    if known is None:
        return (a @ b).float()
    if a.dtype == torch.float32:
        return known.addmm_(a, b)
    return known.add_(a @ b)
