"""The product of a linear layer, by whatever kernel."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from mmdlm.core.kernels import linear as module
from mmdlm.core.kernels.linear import Linear, PackedLayers, linear, products
from tests.core.fakes import rng


@pytest.mark.parametrize("rows", [(), (1,), (5,), (2, 3), (0,), (300,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@torch.no_grad()
def test_it_is_the_product(rows: tuple[int, ...], bias: bool, strided: bool) -> None:
    generator = rng(1)
    x = torch.randn(*rows, 16, generator=generator)
    weight = torch.randn(16, 24, generator=generator).T if strided else torch.randn(24, 16)
    b = torch.randn(24, generator=generator) if bias else None
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    found = linear(x, weight, b)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product of oneDNN's, which serves small ones too."""
    kernel, found = module._ONEDNN, []
    module.onednn_is_used()  # compares products, which do not count
    if kernel is None:
        pytest.skip("this build of torch has no oneDNN")

    def counted(*given: object) -> torch.Tensor:
        found.append(1)
        return kernel(*given)

    monkeypatch.setattr(module, "_ONEDNN", counted)
    monkeypatch.setattr(module, "_LEAST", 0)
    return found


def test_it_is_onednns_for_float32_and_torchs_elsewhere(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = Linear(16, 24), torch.randn(3, 16)
    with torch.no_grad():
        layer(x)
        assert len(calls) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        for packed in (layer.double(), layer.bfloat16()):
            with PackedLayers(packed):
                packed(x.to(packed.weight.dtype))
        assert len(calls) == 1
        monkeypatch.setattr(module, "_LEAST", 3 * 16 * 24 + 1)
        layer.float()(x)
        assert len(calls) == 1
        with PackedLayers(layer):
            layer(x)
    assert len(calls) == 2


@pytest.mark.parametrize("rows", [(), (5,), (2, 3), (1, 4, 2)])
@pytest.mark.parametrize(
    "learning", [("x",), ("weight",), ("bias",), ("x", "weight"), ("x", "weight", "bias")]
)
def test_it_learns_as_torchs_does(
    rows: tuple[int, ...], learning: tuple[str, ...], calls: list[int]
) -> None:
    """To the bit the same product with gradients and without; they are those of float64."""
    given = {
        "x": torch.randn(*rows, 16, generator=rng(1)),
        "weight": torch.randn(24, 16, generator=rng(2)),
        "bias": torch.randn(24, generator=rng(3)),
    }
    slope = torch.randn(24, generator=rng(4)).expand(*rows, 24)  # as a sum gives it

    def gradients(dtype: torch.dtype, product: Any) -> tuple[torch.Tensor, ...]:
        mine = {name: one.to(dtype).requires_grad_(name in learning) for name, one in given.items()}
        y = product(*mine.values())
        found = torch.autograd.grad(y, [mine[name] for name in learning], slope.to(dtype))
        return y.detach(), *found

    exact = gradients(torch.float64, F.linear)
    found = gradients(torch.float32, linear)
    assert len(calls) == 1 + ("x" in learning)
    for one, expected in zip(found, exact, strict=True):
        assert one.shape == expected.shape
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(linear(*given.values()), found[0])


@pytest.mark.parametrize(
    "learning, kept", [("x", ["weight"]), ("weight", ["x"]), ("bias", []), ("x weight", None)]
)
def test_it_keeps_what_gradients_need(
    learning: str, kept: list[str] | None, calls: list[int]
) -> None:
    """So that frozen layers hold no activations, and may be changed where they lie."""
    given = {"x": torch.randn(3, 4), "weight": torch.randn(5, 4), "bias": torch.randn(5)}
    for name in learning.split():
        given[name].requires_grad_()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: seen.append(one.data_ptr()) or one, lambda one: one
    ):
        linear(**given)
    names = ["x", "weight"] if kept is None else kept
    assert sorted(seen) == sorted(given[name].data_ptr() for name in names)
    assert calls


def test_gradients_of_gradients(calls: list[int]) -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    found, expected = (
        torch.autograd.grad(
            sum(
                one.square().sum()
                for one in torch.autograd.grad(
                    product(x, weight).square().sum(), (x, weight), create_graph=True
                )
            ),
            (x, weight),
        )
        for product in (linear, F.linear)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert calls


def test_transforms_have_torchs(calls: list[int]) -> None:
    """Which they know how to transform."""
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    each = torch.func.vmap(lambda row: linear(row[None], weight)[0])(x)
    torch.testing.assert_close(each, F.linear(x, weight))
    with forward_ad.dual_level():
        dual = linear(forward_ad.make_dual(x, torch.ones_like(x)), weight)
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), weight))
    traced = torch.jit.trace(lambda x: linear(x, weight), (x,), check_trace=False)
    assert not calls
    torch.testing.assert_close(traced(2 * x), F.linear(2 * x, weight))


def test_a_compiled_layer_does_not_ask_how_large_a_product_is() -> None:
    """Few rows and many are one graph, as without us."""
    layer = Linear(512, 512)
    sizes = (30, 40, 63, 64, 65, 128)  # on both sides of where oneDNN's would begin
    assert 40 * 512 * 512 < module._LEAST < 128 * 512 * 512
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, backend="eager")
    for size in sizes:
        compiled(torch.randn(size, 512))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one size, and any


def test_a_build_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ONEDNN", None)
    layer, x = Linear(16, 24), torch.randn(3, 16)
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing is known of the kernel, before and after."""
    module.onednn_is_used.cache_clear()
    yield
    module.onednn_is_used.cache_clear()


needs_onednn = pytest.mark.skipif(module._ONEDNN is None, reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("fault", ["bias", "packed", "raises"])
def test_a_kernel_that_differs_is_left_alone_with_one_warning(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, pack = module._ONEDNN, module._PACK

    def wrong(x: torch.Tensor, weight: torch.Tensor, bias: Any, *rest: Any) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("no such kernel")
        return kernel(x, weight, None if fault == "bias" else bias, *rest)

    if fault == "packed":
        monkeypatch.setattr(module, "_PACK", lambda weight, rows: pack(weight.flip(0), rows))
    else:
        monkeypatch.setattr(module, "_ONEDNN", wrong)
    monkeypatch.setattr(module, "_LEAST", 0)
    layer, x = Linear(16, 24), torch.randn(3, 16, generator=rng(1))
    expected = F.linear(x, layer.weight, layer.bias)
    with pytest.warns(RuntimeWarning, match="MMDLM_ONEDNN=0"):
        assert torch.equal(layer(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        with PackedLayers(layer), torch.no_grad():
            assert torch.equal(layer(x), expected)


@needs_onednn
@pytest.mark.usefixtures("fresh")
def test_the_kernel_is_right_on_this_machine() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.onednn_is_used()


@needs_onednn
@pytest.mark.usefixtures("fresh")
def test_the_environment_switches_it_off(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    module.onednn_is_used.cache_clear()
    monkeypatch.setenv("MMDLM_ONEDNN", "0")
    layer, x = Linear(16, 24), torch.randn(3, 16)
    with PackedLayers(layer), torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not calls


@pytest.mark.usefixtures("fresh")
def test_a_switch_that_is_neither_on_nor_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMDLM_ONEDNN", "yes")
    with pytest.raises(ValueError, match="MMDLM_ONEDNN is 'yes'; set it to 1 .* or 0"):
        module.onednn_is_used()


def test_it_is_a_linear_layer() -> None:
    assert isinstance(Linear(2, 3), nn.Linear)


def test_PackedLayers_give_the_same_and_are_unpacked_in_the_end() -> None:
    stack = nn.Sequential(Linear(16, 24, bias=False), nn.Tanh(), Linear(24, 8), nn.Linear(8, 8))
    x = torch.randn(5, 16)
    with torch.no_grad():
        expected = stack(x)
        with PackedLayers(stack):
            torch.testing.assert_close(stack(x), expected, rtol=1e-5, atol=1e-6)
            assert bool(stack[0].packed) == (module._PACK is not None)
            part = stack[2].rows(torch.tanh(stack[0](x)), (2, 5))
            assert part.shape == (5, 3)
            whole = stack[2](torch.tanh(stack[0](x)))
            torch.testing.assert_close(part, whole[:, 2:5], rtol=1e-5, atol=1e-6)
        assert stack[0].packed is stack[2].packed is None
        stack[0].weight.mul_(2)
        with PackedLayers(stack):
            assert not torch.allclose(stack(x), expected)
    with PackedLayers(stack):  # gradients do without
        stack(x).sum().backward()
    assert stack[0].weight.grad is not None
    with pytest.raises(KeyError), PackedLayers(stack):
        raise KeyError
    assert stack[0].packed is None


@pytest.mark.skipif(module._PACK is None, reason="this torch has no oneDNN")
@pytest.mark.parametrize("width", [5, 64])
def test_packed_layers_are_kept_until_something_changes(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packings: list[int] = []
    pack = module._laid_out

    def counted(weight: torch.Tensor) -> torch.Tensor:
        packings.append(1)
        return pack(weight)

    monkeypatch.setattr(module, "_laid_out", counted)
    stack = nn.Sequential(Linear(width, width), nn.Tanh(), Linear(width, width))
    x, packed = torch.randn(5, width), PackedLayers(stack)

    @torch.no_grad()
    def is_right(*, packs: int) -> None:
        packings.clear()
        first, _, second = stack
        expected = torch.tanh(F.linear(x, first.weight, first.bias))
        expected = F.linear(expected, second.weight, second.bias)
        for _ in range(3):
            packed.renew()
            with packed:
                torch.testing.assert_close(stack(x), expected, rtol=1e-4, atol=1e-5)
        assert len(packings) == packs

    is_right(packs=2)
    is_right(packs=0)
    with torch.no_grad():
        stack[0].weight.copy_(stack[0].weight.flip(0))
    is_right(packs=2)
    for change in (  # past torch's count of changes
        lambda data: data.mul_(2),
        lambda data: data.neg_(),
        lambda data: data.copy_(data.flip(0)),
        lambda data: data.copy_(data.flip(-1)),
        lambda data: data.add_(1),
    ):
        for layer in (stack[0], stack[2]):
            change(layer.weight.data)
            is_right(packs=2)
        change(stack[2].bias.data)
        is_right(packs=2)
    stack.load_state_dict({name: -value for name, value in stack.state_dict().items()})
    is_right(packs=2)
    stack[2] = Linear(width, width)
    is_right(packs=2)
    twin = copy.deepcopy(packed)
    assert twin.module is not stack
    twin.renew()
    with twin:
        twin.module(x)
    stack[2].register_forward_hook(lambda *_: None)
    is_right(packs=1)
    with torch.inference_mode():
        stack[0].weight = nn.Parameter(torch.randn(width, width), requires_grad=False)
    is_right(packs=1)


def test_large_and_half_precision_weights_are_left_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = Linear(16, 24)
    with PackedLayers(Linear(16, 24).bfloat16()) as nothing, PackedLayers(object()):
        assert nothing is None
    monkeypatch.setattr(module, "_MOST", 100)
    with PackedLayers(layer):
        assert layer.packed is None


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_products_of_one_input_are_those_of_each_layer(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    kernel = module._onednn

    def counted(*given: Any) -> torch.Tensor:
        calls.append(1)
        return kernel(*given)

    monkeypatch.setattr(module, "_onednn", counted)
    layers = nn.ModuleList(Linear(16, width, bias=bias) for width in (24, 8, 5))
    x = torch.randn(2, 3, 16)
    expected = [layer(x) for layer in layers]
    for found, wanted in zip(products(x, *layers), expected, strict=True):
        assert torch.equal(found, wanted)
    assert not calls
    with PackedLayers(layers):
        for _ in range(2):
            for found, wanted in zip(products(x, *layers), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert len(calls) == (0 if module._ONEDNN is None else 2)  # one product each time


@torch.no_grad()
def test_products_pass_nobody_by_who_listens_or_has_changed_a_layer() -> None:
    layers, heard, x = nn.ModuleList(Linear(4, 4) for _ in range(3)), [], torch.randn(2, 4)
    layers[1].register_forward_hook(lambda *given: heard.append(given[0]))
    layers[2].forward = lambda input: torch.zeros(2, 4)  # as accelerate's offloading does
    with PackedLayers(layers):
        found = products(x, *layers)
    assert heard == [layers[1]]
    assert torch.equal(found[2], torch.zeros(2, 4))
    mixed = products(x, layers[0], nn.Linear(4, 2))
    assert [one.shape[1] for one in mixed] == [4, 2]
