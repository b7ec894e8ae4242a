"""Cross-entropy of a linear head, in chunks of rows, so that all logits never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdlm.core.linear import linear

# Logits at a time on a GPU, 256 MB in float32; elsewhere rows, of which products like 32 times some
# number, and no more than caches hold: 132 or 265 of them take 5 and 20 % longer.
_LOGITS_ON_GPU, _ROWS = 1 << 26, 256


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
    have no factor. It serves GPUs too: cut-cross-entropy (arXiv:2411.09009) saves the chunk, but
    takes states in 16 bits alone and computes the logits once more.
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
        of_states = torch.empty_like(states) if for_states else None
        # As large as the head, so there is one of it, from the first sum to the optimizer.
        of_head = torch.zeros_like(head) if for_head else None
        sum_of_head = None if of_head is None else of_head[slice(*ids)].float()  # a view, mostly
        head = head[slice(*ids)].to(dtype)
        rows = max(1, _LOGITS_ON_GPU // max(1, len(head))) if states.is_cuda else _ROWS
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
            if for_states or for_head:
                slope = share.mul_(weight / sum_).scatter_add_(1, wanted, -weight).to(states.dtype)
                if of_states is not None:
                    of_states[here] = linear(slope, head.T)
                if sum_of_head is not None:
                    _add_product(sum_of_head, slope.T, some)
                del slope
            del logits, share  # before the next ones are made
        if of_head is not None and sum_of_head is not None and of_head.dtype != sum_of_head.dtype:
            of_head[slice(*ids)] = sum_of_head
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


def _add_product(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    """sum_ += a @ b, in float32."""
    if a.dtype == torch.float32:
        sum_.addmm_(a, b)
    else:
        sum_.add_(a @ b)
