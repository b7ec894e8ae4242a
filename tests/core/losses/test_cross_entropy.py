"""The cross-entropy of a linear head against that of its logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.core.losses import fused_cross_entropy as cross_entropy
from mmdlm.core.losses.fused_cross_entropy import linear_cross_entropy, linear_log_prob
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
    monkeypatch.setattr(cross_entropy, "_rows", lambda *_: rows)
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
    monkeypatch.setattr(cross_entropy, "_rows", lambda *_: rows)
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
    monkeypatch.setattr(cross_entropy, "_rows", lambda *_: 10)
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


# ---- log-probabilities --------------------------------------------------------------------------


def likelihoods(states: Tensor, head: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies in float64, all logits at once."""
    log_p = F.linear(states.double(), head.double()).log_softmax(-1)
    return log_p.gather(1, label[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


@pytest.mark.parametrize("rows", [1, 7, 37, 1000])
@pytest.mark.parametrize("ids", [None, (10, 40)])
def test_log_probabilities_and_gradients_are_those_of_all_logits(
    rows: int, ids: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token's own, whatever is made of them."""
    monkeypatch.setattr(cross_entropy, "_rows", lambda *_: rows)
    states, head, label, _ = given()
    label = label % 30
    expected, spread = likelihoods(states, head if ids is None else head[slice(*ids)], label)
    found, entropy = linear_log_prob(states, head, label, ids=ids, entropy=True)
    assert found.dtype == entropy.dtype == torch.float32
    assert not entropy.requires_grad
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), spread, rtol=1e-5, atol=1e-6)
    of_expected = torch.autograd.grad(expected.exp().log1p().sum(), (states, head))
    of_found = torch.autograd.grad(found.exp().log1p().sum(), (states, head), retain_graph=True)
    for one, other in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    again = torch.autograd.grad(found.exp().log1p().sum(), (states, head))
    torch.testing.assert_close(again, of_found, rtol=0, atol=0)
    alone, nothing = linear_log_prob(states, head, label, ids=ids)
    assert nothing is None
    assert torch.equal(alone, found)


@pytest.mark.parametrize("frozen", ["states", "head", "both", "no_grad"])
def test_what_does_not_learn_has_the_same_log_probabilities(frozen: str) -> None:
    """To the bit: a policy and its reference."""
    states, head, label, _ = given()
    expected, _ = linear_log_prob(states, head, label)
    states.requires_grad_(frozen not in ("states", "both"))
    head.requires_grad_(frozen not in ("head", "both"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        found, _ = linear_log_prob(states, head, label)
    assert torch.equal(found, expected)
    assert found.requires_grad == (frozen in ("states", "head"))
    if found.requires_grad:
        found.sum().backward()
        assert (states.grad is None) == (frozen == "states")
        assert (head.grad is None) == (frozen == "head")


@pytest.mark.parametrize("autocast", [False, True])
def test_log_probabilities_in_half_precision(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near as those of all logits are."""
    monkeypatch.setattr(cross_entropy, "_rows", lambda *_: 10)
    states, head, label, factor = given(torch.float32 if autocast else torch.bfloat16)
    expected, _ = likelihoods(states, head, label)
    exact = torch.autograd.grad((factor * expected).sum(), (states, head))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = linear_log_prob(states, head, label)
        logits = F.linear(states, head).float()
        usual = -F.cross_entropy(logits, label, reduction="none")
    error, bar = (float((one - expected).abs().max()) for one in (found, usual))
    assert error <= 1.1 * bar + 1e-6
    mine = torch.autograd.grad((factor * found).sum(), (states, head))
    theirs = torch.autograd.grad((factor * usual).sum(), (states, head))
    for one, other, true in zip(mine, theirs, exact, strict=True):
        assert one.dtype == other.dtype
        error, bar = (float((g.float() - true.float()).norm()) for g in (one, other))
        assert error <= 1.1 * bar


def test_a_frozen_head_keeps_no_states() -> None:
    states, head, label, _ = given()
    sizes: dict[bool, list[int]] = {}
    for learning in (True, False):
        seen = sizes.setdefault(learning, [])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda one, seen=seen: seen.append(one.numel()) or one, lambda one: one
        ):
            linear_log_prob(states, head.requires_grad_(learning), label)
    assert sizes == {True: [M * D, M * D, R * D, M], False: [M * D]}


@pytest.mark.parametrize("ids", [0, 1, 32, 8192, 24_576, 134_656, 1 << 30])
def test_so_many_rows_have_logits_at_once(ids: int) -> None:
    here, on_gpu = cross_entropy._rows(ids, "cpu"), cross_entropy._rows(ids, "cuda")
    assert here % 32 == 0
    assert here == 256 or here * ids <= 1 << 22
    assert on_gpu == 1 or on_gpu * ids <= 1 << 26


def test_no_log_probabilities() -> None:
    states, head, label, _ = given()
    found, entropy = linear_log_prob(states[:0], head, label[:0], entropy=True)
    assert found.shape == entropy.shape == (0,)
    found.sum().backward()
    assert not bool(head.grad.any())
