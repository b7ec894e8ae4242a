"""Linear layers computed by oneDNN on a CPU where that is faster, and by torch elsewhere.

The environment variable `MMDLM_ONEDNN=0` switches oneDNN's kernel off. Before its first use the
kernel is compared with torch's product on a small case; where the two differ, a warning is given
once and torch's product is used.
"""

from __future__ import annotations

import os
import warnings
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

# oneDNN's product, which torch.compile calls as well. A build of torch without it has none.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_MOST = 2 << 30  # bytes
_LEAST = 1 << 24  # multiplications, below which our way there takes longer than the product
_ROWS = 32  # of a product; the layout is good for any
_PLAIN = (Tensor, nn.Parameter)  # and no quantized or sharded weight
Rows = tuple[int, int]  # a half-open range of the outputs of a layer
Packed = dict[Rows | tuple[nn.Module, ...], tuple[Tensor, Tensor | None]]
# What the thread that runs has entered, the innermost last: threads that share a model each have
# their own, so that none unpacks the layers of another.
_ENTERED: ContextVar[tuple[dict[nn.Module, Packed], ...]] = ContextVar("entered", default=())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., D], [R, D], [R] -> [..., R], as `F.linear` but for rounding.

    In float32 on a CPU it is oneDNN's, unless it is small: MKL, which `F.linear` calls, packs the
    weight again for every product, which costs most where rows are few. Measured on 2 cores of an
    AMD EPYC (AVX-512) over 12 layers of width 512: 69 -> 108 GFLOP/s for 32 rows, 139 -> 179 for
    256, and packed (`PackedLayers`) 153 and 203; the head of 24,576 ids, 32 rows: 56 -> 119. Steps
    of training, forward and backward, of 4 x 320 and 4 x 512 tokens take 3 and 5 % less.

    With gradients and without them it is the same to the bit, as a policy and its reference need.
    """
    # In this order: a compiler must not see the sizes, on which it would make its graph depend.
    if not _fits(x) or not _is_plain(weight) or x.numel() * len(weight) < _LEAST:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        product: Tensor = _Product.apply(x, weight, bias)
        return product
    return _onednn(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert _ONEDNN is not None
    product: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    """oneDNN's, which torch gives without gradients. Double backward goes through `linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = slope.reshape(-1, slope.shape[-1])
        return (
            None if weight is None else linear(slope, weight.T),
            # torch's own: oneDNN would have both turned around before
            None if x is None else rows.T @ x.reshape(-1, x.shape[-1]),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _fits(x: Tensor) -> bool:
    """Whether oneDNN may multiply it."""
    return (
        _ONEDNN is not None
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and type(x) in _PLAIN
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and onednn_is_used()
    )


@cache
def onednn_is_used() -> bool:
    """Return whether oneDNN's kernel is switched on and gives the product that torch gives.

    Read once in a process; `onednn_is_used.cache_clear()` makes it look again.

    Returns:
        False also where the processor or torch lacks the kernel.

    Raises:
        ValueError: If `MMDLM_ONEDNN` is neither 0 nor 1.
    """
    wanted = os.environ.get("MMDLM_ONEDNN", "1")
    if wanted not in ("0", "1"):
        raise ValueError(
            f"MMDLM_ONEDNN is {wanted!r}; set it to 1 (use oneDNN's kernel) or 0 (use torch's)"
        )
    if wanted == "0" or _ONEDNN is None:
        return False
    if _is_right():
        return True
    warnings.warn(
        "oneDNN's linear kernel gives other numbers than torch's on this machine, so torch's is "
        "used; set MMDLM_ONEDNN=0 to skip the comparison",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


@torch.no_grad()
def _is_right() -> bool:
    """Compare oneDNN's products with float64: plain, packed and transposed weights, with a bias."""
    assert _ONEDNN is not None
    with _disable_current_modes():  # a counter of operations must not count these
        x, weight, bias = (_numbers(*shape) for shape in ((5, 48), (40, 48), (40,)))
        exact = F.linear(x.double(), weight.double(), bias.double())
        try:
            found = (
                _ONEDNN(x, weight, bias, "none", [], ""),
                _ONEDNN(x, weight.T.contiguous().T, bias, "none", [], ""),
                _ONEDNN(x, _laid_out(weight), bias, "none", [], ""),
            )
        except (RuntimeError, NotImplementedError):
            return False
        return all(torch.allclose(one.double(), exact, rtol=1e-4, atol=1e-4) for one in found)


def _numbers(*shape: int) -> Tensor:
    """Return a float32 tensor on the CPU, no two of whose numbers are alike."""
    size = torch.Size(shape).numel()
    return torch.arange(size, dtype=torch.float64, device="cpu").cos().float().view(shape)


def _is_plain(weight: Tensor) -> bool:
    """Whether oneDNN takes it."""
    return type(weight) in _PLAIN and weight.dtype == torch.float32 and weight.device.type == "cpu"


class Linear(nn.Linear):
    """torch's, computed by `linear`."""

    @property
    def packed(self) -> Packed | None:
        """Weights as oneDNN wants them, and biases; None outside of `PackedLayers`.

        By the rows of a product, or by the layers that have one in common.
        """
        entered = _ENTERED.get()
        return entered[-1].get(self) if entered else None

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] -> [..., R]."""
        return self._product(input, self.weight, self.bias, (0, self.out_features))

    def rows(self, x: Tensor, ids: Rows) -> Tensor:
        """[..., D] -> [..., stop - start], of some of the outputs."""
        wanted_rows = slice(*ids)
        bias = None if self.bias is None else self.bias[wanted_rows]
        return self._product(x, self.weight[wanted_rows], bias, ids)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
        if torch.is_grad_enabled() or not _fits(x) or (packed := self.packed) is None:
            return linear(x, weight, bias)
        if rows not in packed:
            packed[rows] = _laid_out(weight), bias
        return _onednn(x, *packed[rows])


def products(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Apply several layers to the same x [..., D]: in one product if they are packed."""
    if torch.is_grad_enabled() or not _fits(x) or not _are_packed(layers):
        return tuple(layer(x) for layer in layers)
    packed, sizes = layers[0].packed, [layer.out_features for layer in layers]
    assert packed is not None
    if layers not in packed:
        weight = torch.cat([layer.weight for layer in layers])
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        assert len(biases) in (0, len(layers)), "all have a bias, or none"
        packed[layers] = _laid_out(weight), torch.cat(biases) if biases else None
    return _onednn(x, *packed[layers]).split(sizes, dim=-1)


def _are_packed(layers: tuple[nn.Module, ...]) -> TypeGuard[tuple[Linear, ...]]:
    return all(isinstance(layer, Linear) and layer.packed is not None for layer in layers)


def _laid_out(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight if _PACK is None else _PACK(weight, _ROWS)


class PackedLayers:
    """Within the block weights of `Linear` layers lie as oneDNN wants them, from their first use.

    It can be entered again and again, by several threads at a time, and packs once: the weights
    must not change but before `renew`. It takes about as much memory as they do, for as long as it
    lives, so that a model above 2 GB is left as it is, and about a third of a pass: what is worth
    it are several. Layers that somebody listens to or has changed stay as they are.
    """

    def __init__(self, module: object) -> None:
        self.module = module
        self._packed: dict[nn.Module, Packed] = {layer: {} for layer in _layers(module)}
        self._marks: list[tuple[float, ...]] | None = None  # of the layers, when they were packed

    def __getstate__(self) -> dict[str, Any]:
        """Leave packed weights out of a copy: oneDNN's tensors can be neither copied nor stored."""
        return {"module": self.module, "_packed": {}, "_marks": None}

    def renew(self) -> None:
        """Forget what is packed if any layer has changed since the last call, whoever changed it.

        Reads all weights once, a tenth of the time that packing takes.
        """
        layers = _layers(self.module)
        host_masks = [_mark(layer) for layer in layers]
        if host_masks != self._marks:
            self._packed, self._marks = {layer: {} for layer in layers}, host_masks

    def __enter__(self) -> None:
        _ENTERED.set((*_ENTERED.get(), self._packed))

    def __exit__(self, *_: object) -> None:
        _ENTERED.set(_ENTERED.get()[:-1])


def _layers(module: object) -> list[Linear]:
    """Those of a module that are packed."""
    modules = module.modules() if isinstance(module, nn.Module) else ()
    layers = [one for one in modules if type(one) is Linear and _is_untouched(one)]
    return layers if sum(layer.weight.nbytes for layer in layers) <= _MOST else []


@torch.no_grad()
def _mark(layer: Linear) -> tuple[float, ...]:
    """Other numbers for another layer, and for this one with other parameters.

    The count of changes that torch keeps knows nothing of those past it (`.data`). So parameters
    are also summed, each element with a weight of its own.
    """
    found: list[float] = [id(layer)]
    for one in (layer.weight, layer.bias):
        if one is not None:
            changes = 0 if one.is_inference() else one._version
            sums = linear(_weights(one.shape[-1]), one.detach()) if one.ndim > 1 else one
            found += one.data_ptr(), changes, float(sums @ _weights(len(sums)))
    return tuple(found)


@cache
def _weights(size: int) -> Tensor:
    """[size] float32, no two alike."""
    return torch.arange(size, dtype=torch.float64).cos().float()


def _is_untouched(layer: Linear) -> bool:
    """Without hooks, which a product of several layers would pass by, and with plain weights."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return not hooks and "forward" not in vars(layer) and _is_plain(layer.weight)
