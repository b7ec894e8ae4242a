"""The cross-entropy of a linear head against that of its logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core import cross_entropy
from mmdlm.core.cross_entropy import linear_cross_entropy
from tests.core.fakes import rng

M, D, R = 37, 16, 50


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = rng(1)
    states = 3 * torch.randn(M, D, generator=generator)
    head = torch.randn(R, D, generator=generator)
    label = torch.randint(R, (M,), generator=generator)
    factor = torch.rand(M, generator=generator) * 10
    return states.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), label, factor


def plain(states: Tensor, head: Tensor, label: Tensor, factor: Tensor) -> Tensor:
    """In float64, all logits at once."""
    losses = F.cross_entropy(F.linear(states.double(), head.double()), label, reduction="none")
    return (factor * losses).sum()


@pytest.mark.parametrize("rows", [1, 7, 37, 1000])
def test_value_and_gradients_are_those_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(cross_entropy, "_ROWS", rows)
    states, head, label, factor = given()
    expected = plain(states, head, label, factor)
    of_states, of_head = torch.autograd.grad(expected, (states, head))
    found = linear_cross_entropy(states, head, label, factor)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    (found / 3).backward()
    torch.testing.assert_close(3 * states.grad, of_states, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(3 * head.grad, of_head, rtol=1e-5, atol=5e-5)


def test_logits_beyond_the_range_of_exp() -> None:
    states, head, label, factor = given()
    large = (100 * states).detach().requires_grad_()
    found = linear_cross_entropy(large, head, label, factor)
    torch.testing.assert_close(found.double(), plain(large, head, label, factor), rtol=1e-6, atol=0)
    found.backward()
    assert bool(large.grad.isfinite().all())


@pytest.mark.parametrize("frozen", ["states", "head", "both", "no_grad"])
def test_only_gradients_that_are_wanted_are_taken(frozen: str) -> None:
    states, head, label, factor = given()
    expected = plain(states, head, label, factor)
    states.requires_grad_(frozen not in ("states", "both"))
    head.requires_grad_(frozen not in ("head", "both"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        found = linear_cross_entropy(states, head, label, factor)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert found.requires_grad == (frozen in ("states", "head"))
    if found.requires_grad:
        found.backward()
        assert (states.grad is None) == (frozen == "states")
        assert (head.grad is None) == (frozen == "head")


@pytest.mark.parametrize("rows", [7, 1000])
def test_a_range_of_a_head_learns_in_its_place(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(cross_entropy, "_ROWS", rows)
    states, head, label, factor = given()
    expected = plain(states, head[10:40], label % 30, factor)
    of_states, of_head = torch.autograd.grad(expected, (states, head))
    found = linear_cross_entropy(states, head, label % 30, factor, ids=(10, 40))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    found.backward(retain_graph=True)
    torch.testing.assert_close(states.grad, of_states, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(head.grad, of_head, rtol=1e-5, atol=5e-5)
    assert not bool(head.grad[:10].any() | head.grad[40:].any())
    (2 * found).backward()  # adds to what is there
    torch.testing.assert_close(head.grad, 3 * of_head, rtol=1e-5, atol=2e-4)
    with pytest.raises(RuntimeError, match="second time"):
        found.backward()


def test_a_backward_pass_makes_no_second_gradient_of_the_head() -> None:
    states, head, label, factor = given()
    found = linear_cross_entropy(states, head, label, factor)
    kept = found.grad_fn.saved_tensors[1].data_ptr()
    (found / 3).backward()
    assert head.grad.data_ptr() == kept


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_near_as_with_all_logits(
    monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> None:
    monkeypatch.setattr(cross_entropy, "_ROWS", 10)
    states, head, label, factor = given(torch.float32 if autocast else torch.bfloat16)
    expected = plain(states, head, label, factor)
    exact = torch.autograd.grad(expected, (states, head))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = linear_cross_entropy(states, head, label, factor)
        logits = F.linear(states, head).float()
        usual = (factor * F.cross_entropy(logits, label, reduction="none")).sum()
    assert abs(found - expected) <= 2 * abs(usual - expected) + 1e-3 * abs(expected)
    ours = torch.autograd.grad(found, (states, head))
    theirs = torch.autograd.grad(usual, (states, head))
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - right).norm() <= 1.2 * (other - right).norm()


def test_nothing_to_learn_from() -> None:
    states, head, label, factor = given()
    found = linear_cross_entropy(states[:0], head, label[:0], factor[:0])
    found.backward()
    assert float(found) == 0
    assert not bool(head.grad.any())
