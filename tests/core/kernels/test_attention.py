"""Softmax attention by plain products against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmdlm.core.kernels import attention as kernel
from mmdlm.core.kernels.precision import fast_dtype


@pytest.mark.parametrize("masked", [False, True])
def test_products_are_near_float64(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "fast_dtype", lambda device: torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(3, 2, 20, 16, generator=generator, dtype=torch.float64) for _ in range(3)]
    mask = torch.rand(3, 1, 20, 20, generator=generator) < 0.5 if masked else None
    if mask is not None:
        mask |= torch.eye(20, dtype=torch.bool)
    given = [one.bfloat16().requires_grad_() for one in exact]
    expected = [one.detach().double().requires_grad_() for one in given]
    output = kernel.attention(*given, attn_mask=mask)
    reference = F.scaled_dot_product_attention(*expected, attn_mask=mask)
    assert output.dtype == torch.bfloat16
    assert not torch.equal(output, F.scaled_dot_product_attention(*given, attn_mask=mask))
    torch.testing.assert_close(output.double(), reference, atol=0.03, rtol=0)
    slope = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(slope.bfloat16())
    reference.backward(slope)
    for one, other in zip(given, expected, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, atol=0.08, rtol=0)


def test_long_rows_and_float32_take_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "fast_dtype", lambda device: torch.bfloat16)
    long = torch.randn(1, 1, kernel.SHORT + 1, 4)
    for one in (long, long.bfloat16(), long[:, :, :9]):
        expected = F.scaled_dot_product_attention(one, one, one)
        assert torch.equal(kernel.attention(one, one, one), expected)


def test_no_gpu_is_asked_for_a_cpu() -> None:
    native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    assert fast_dtype(torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)
    assert fast_dtype(torch.device("meta")) == torch.float32
