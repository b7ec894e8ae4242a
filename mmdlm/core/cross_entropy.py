"""Cross-entropy of a linear head, in chunks of rows, so that all logits never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdlm.core.linear import linear

_CHUNK = 1 << 26  # logits at a time (256 MB in float32)


def linear_cross_entropy(states: Tensor, head: Tensor, label: Tensor, factor: Tensor) -> Tensor:
    """sum_i factor_i * -log softmax(head states_i)[label_i], a float32 scalar.

    states  [M, D]
    head    [R, D]
    label   [M] int64, rows of the head
    factor  [M], without gradient

    The gradients of states and head are taken along the way, while the logits of a chunk are there:
    three matrix products as with all logits at once, and the memory of one chunk. Under autocast
    the products are in its dtype; softmax and sums are in float32.

    Source: the order of computation is that of Liger Kernel (arXiv:2410.10989), where token losses
    have no factor.
    """
    kind = states.device.type
    if torch.is_autocast_enabled(kind):
        states, head = (x.to(torch.get_autocast_dtype(kind)) for x in (states, head))
    total: Tensor = _LinearCrossEntropy.apply(
        states, head, label, factor.detach().float(), torch.is_grad_enabled()
    )
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, label: Tensor, factor: Tensor, learning: bool
    ) -> Tensor:
        of_states = of_head = None
        if learning and states.requires_grad:
            of_states = torch.empty_like(states)
        if learning and head.requires_grad:
            of_head = torch.zeros_like(head, dtype=torch.float32)
        rows = max(1, _CHUNK // max(1, len(head)))
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
            if of_states is None and of_head is None:
                continue
            slope = share.mul_(weight / sum_).scatter_add_(1, wanted, -weight).to(states.dtype)
            if of_states is not None:
                of_states[here] = linear(slope, head.T)
            if of_head is not None:
                _add_product(of_head, slope.T, some)
        ctx.save_for_backward(of_states, None if of_head is None else of_head.to(head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        given = (None if x is None else x * slope.to(x.dtype) for x in ctx.saved_tensors)
        return (*given, None, None, None)


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a @ b, the sum in float32."""
    if a.dtype == torch.float32:
        into.addmm_(a, b)
    else:
        into += a @ b
