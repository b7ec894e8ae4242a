"""x W^T + b by the fastest kernel that there is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN's product, which torch.compile calls as well. A build of torch without it has none.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_MOST = 2 << 30  # bytes
_ROWS = 32  # of a product; the layout is good for any
_PLAIN = (Tensor, nn.Parameter)  # and no quantized or sharded weight


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, packed: Tensor | None = None
) -> Tensor:
    """[..., D], [R, D], [R] -> [..., R], as `F.linear` but for rounding.

    packed  the weight as `PackedLayers` lays it out; None: as it is

    Without gradients, in float32 on a CPU, it is oneDNN's: MKL, which `F.linear` calls, packs the
    weight anew for every product, and that costs most where rows are few. Measured on 2 cores of an
    AMD EPYC (AVX-512) over 12 layers of width 512: 69 -> 108 GFLOP/s for 32 rows, 139 -> 179 for
    256, and packed 153 and 203; the head of 24,576 ids, 32 rows: 56 -> 119.
    """
    if _ONEDNN is None or not _fits(x, weight):
        return F.linear(x, weight, bias)
    product: Tensor = _ONEDNN(x, weight if packed is None else packed, bias, "none", [], "")
    return product


def _fits(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and _is_plain(weight)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
    )


def _is_plain(weight: Tensor) -> bool:
    """Whether oneDNN takes it."""
    return type(weight) in _PLAIN and weight.dtype == torch.float32 and weight.device.type == "cpu"


class Linear(nn.Linear):
    """torch's, computed by `linear` within `PackedLayers`.

    Not elsewhere: a policy with gradients and its reference without them have to agree to the bit.

    packed  weights as oneDNN wants them, by the ids of their rows; None outside
    """

    packed: dict[tuple[int, int], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] -> [..., R]."""
        return self._product(input, self.weight, self.bias, (0, self.out_features))

    def rows(self, x: Tensor, ids: tuple[int, int]) -> Tensor:
        """[..., D] -> [..., stop - start], of a half-open range of the outputs."""
        here = slice(*ids)
        bias = None if self.bias is None else self.bias[here]
        return self._product(x, self.weight[here], bias, ids)

    def _product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, ids: tuple[int, int]
    ) -> Tensor:
        if self.packed is None or torch.compiler.is_compiling():
            return F.linear(x, weight, bias)
        if ids not in self.packed and _PACK is not None:
            self.packed[ids] = _PACK(weight.detach(), _ROWS)
        return linear(x, weight, bias, packed=self.packed.get(ids))


class PackedLayers:
    """Within the block weights of `Linear` layers lie as oneDNN wants them, from their first use.

    It can be entered again and again, and packs once: the weights must not change meanwhile. It
    takes as much memory as they do, so that a model above 2 GB is left as it is, and a moment: what
    is worth it are several passes.
    """

    def __init__(self, module: object) -> None:
        modules = module.modules() if isinstance(module, nn.Module) else ()
        layers = [one for one in modules if isinstance(one, Linear) and _is_plain(one.weight)]
        if sum(layer.weight.nbytes for layer in layers) > _MOST:
            layers = []
        self._packed: list[tuple[Linear, dict[tuple[int, int], Tensor]]] = [
            (layer, {}) for layer in layers
        ]

    def __enter__(self) -> None:
        for layer, packed in self._packed:
            layer.packed = packed

    def __exit__(self, *_: object) -> None:
        for layer, _packed in self._packed:
            layer.packed = None
