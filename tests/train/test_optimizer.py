"""Every parameter moves exactly once, at the rate and with the decay that were meant for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mmdlm.core.kernels.precision import fast_dtype
from mmdlm.vision.tokenizers.magvit2 import Magvit2Tokenizer
from mmdlm.vision.tokenizers.patch_tokenizer import PatchTokenizer
from tests.models.tiny import tiny_model
from train.optimizer import (
    AdamW,
    Cosine,
    ExponentialMovingAverage,
    LearningRate,
    Muon,
    Optimizer,
    WarmupStableDecay,
    decay_groups,
    orthogonalise,
)

MODELS = {
    "transformer": lambda: tiny_model(attention_bias=True, qk_norm=True),
    "tied transformer": lambda: tiny_model(tie_word_embeddings=True),
    "patch tokenizer": lambda: PatchTokenizer(image_size=16, patch=4, width=16, heads=2),
    "magvit2": lambda: Magvit2Tokenizer(
        ch=32, ch_mult=(1, 1), num_res_blocks=(1, 1), z_channels=4, resolution=16
    ),
}


models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def decayed_names(module: nn.Module) -> set[str]:
    """By the names that the parameters have, where the code goes by the modules that own them."""
    return {
        name
        for name, parameter in module.named_parameters()
        if name.endswith("weight")
        and parameter.ndim >= 2
        and not any(part in name for part in ("norm", "embed", "position"))
    }


# ---- groups -------------------------------------------------------------------------------------


@models
def test_weights_of_layers_decay_and_nothing_else(build: Callable[[], nn.Module]) -> None:
    module = build()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, plain = decay_groups(module)
    assert {names[id(p)] for p in decayed} == decayed_names(module)
    assert decayed
    every = [id(p) for p in (*decayed, *plain)]
    assert sorted(every) == sorted(names)  # each once


def test_a_tied_weight_counts_once_and_as_an_embedding() -> None:
    model = tiny_model(tie_word_embeddings=True)
    decayed, plain = decay_groups(model)
    tied = model.lm_head.weight
    assert [p is tied for p in plain].count(True) == 1
    assert not any(p is tied for p in decayed)


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    decayed, plain = decay_groups(module)
    assert [tuple(p.shape) for p in (*decayed, *plain)] == [(2, 4), (2,)]


def test_positions_given_as_bare_parameters_do_not_decay() -> None:
    tokenizer = PatchTokenizer(image_size=16, patch=4, width=16, heads=2)
    decayed, _ = decay_groups(tokenizer)
    assert not any(p is tokenizer.encoder_position for p in decayed)
    assert any(p is tokenizer.seams[0].weight for p in decayed)


@models
@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=["AdamW", "Muon"])
def test_an_optimizer_holds_every_parameter_once(
    optimizer: Optimizer, build: Callable[[], nn.Module]
) -> None:
    module = build()
    built = optimizer.build(module)
    held = [id(p) for one in built for group in one.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())
    assert all(group["peak"] > 0 for one in built for group in one.param_groups)


def test_adamw_decays_what_it_should() -> None:
    """Without a gradient, decay is all that moves a weight."""
    model = tiny_model(attention_bias=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    (optimizer,) = AdamW(learning_rate=0.1, weight_decay=0.5).build(model)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in decayed_names(model) else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


# ---- rates of their own -------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [AdamW(0.5), Muon(0.5, rest=AdamW(0.25))], ids=str)
def test_a_rate_of_its_own_is_the_peak_of_each_such_parameter(optimizer: Optimizer) -> None:
    """Matrices, biases and embeddings alike, and every other parameter keeps its group."""
    model = tiny_model(attention_bias=True, qk_norm=True)
    own = {*model.model.layers[0].parameters(), *model.lm_head.parameters()}
    usual = peaks(optimizer.build(model))
    given = optimizer.build(model, rates=dict.fromkeys(own, 0.125))
    assert peaks(given) == {p: 0.125 if p in own else peak for p, peak in usual.items()}
    assert set(peaks(given)) == set(model.parameters())
    assert given[0].param_groups[0]["peak"] == 0.5  # what is logged
    for group in (group for one in given for group in one.param_groups):
        assert group["lr"] == group["peak"]
    decay = {p: group["weight_decay"] for group in given[-1].param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter in own:  # by AdamW, whichever optimizer the rest has
            assert decay[parameter] == (0.01 if name in decayed_names(model) else 0.0), name


@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=["AdamW", "Muon"])
def test_frozen_parameters_have_no_group_whatever_their_rate(optimizer: Optimizer) -> None:
    model = tiny_model()
    frozen = set(model.model.layers.parameters())
    for parameter in frozen:
        parameter.requires_grad_(False)
    built = optimizer.build(model, rates=dict.fromkeys(model.parameters(), 0.125))
    assert set(peaks(built)) == set(model.parameters()) - frozen


def peaks(optimizers: list[torch.optim.Optimizer]) -> dict[nn.Parameter, float]:
    """Each parameter's peak; it must stand in one group alone."""
    groups = [group for one in optimizers for group in one.param_groups]
    held = [(p, group["peak"]) for group in groups for p in group["params"]]
    assert len(held) == len(dict(held))
    return dict(held)


# ---- Muon ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32), (8, 200), (200, 8), (1, 16)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1e-4, 1e4):
        near = orthogonalise(scale * matrix, iterations=5)
        assert near.dtype == torch.float32
        values = torch.linalg.svdvals(near[0])
        if shape != (64, 64):  # the smallest values of a square one are almost zero
            assert values.min() > 0.6
        assert values.max() < 1.3


def test_orthogonalise_keeps_the_singular_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(12, 20, generator=generator), full_matrices=False)
    values = torch.linspace(0.5, 3.0, 12)
    near = orthogonalise((u * values @ v)[None], iterations=5)[0]
    inner = u.T @ near @ v.T
    exact = fast_dtype(torch.device("cpu")) == torch.float32
    atol = 1e-4 if exact else 0.08
    torch.testing.assert_close(inner, inner.diag().diag(), atol=atol, rtol=0)
    assert (inner.diag() > 0.6).all()


def test_a_batch_of_matrices_is_as_each_alone() -> None:
    matrices = torch.randn(5, 24, 16, generator=torch.Generator().manual_seed(0))
    together = orthogonalise(matrices, iterations=5)
    for matrix, near in zip(matrices, together, strict=True):
        torch.testing.assert_close(near, orthogonalise(matrix[None], iterations=5)[0])


def test_orthogonalise_of_nothing_is_nothing() -> None:
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 6), iterations=5), torch.zeros(1, 4, 6))


def test_muon_takes_the_matrices_of_the_layers_and_leaves_the_ends() -> None:
    model = tiny_model(attention_bias=True, qk_norm=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, rest = Muon().build(model)
    taken = {names[id(p)] for group in matrices.param_groups for p in group["params"]}
    assert taken == {
        f"model.layers.{n}.{name}.weight"
        for n in range(2)
        for name in (
            *(f"self_attn.{one}_proj" for one in "qkvo"),
            *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
        )
    }
    assert len(rest.param_groups) == 2


def test_muon_moves_a_matrix_as_its_formula_says() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 24, bias=False)
    model = nn.Sequential(nn.ModuleList([nn.Sequential(layer, nn.GELU())]), nn.Linear(24, 3))
    optimizer, _ = Muon(learning_rate=0.1, momentum=0.9, weight_decay=0.01).build(model)
    expected, momentum = layer.weight.detach().clone(), torch.zeros(24, 6)
    for _ in range(3):
        gradient = torch.randn(24, 6, generator=generator)
        momentum = 0.9 * momentum + 0.1 * gradient
        update = orthogonalise((0.9 * momentum + 0.1 * gradient)[None], iterations=5)[0]
        expected = expected * (1 - 0.1 * 0.01) - 0.1 * math.sqrt(24 / 6) * update
        layer.weight.grad = gradient
        optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), expected)


# ---- learning rate ------------------------------------------------------------------------------


def test_cosine_values() -> None:
    schedule = Cosine(warmup=10, final=0.1)
    assert schedule.factor(0, 110) == pytest.approx(0.1)
    assert schedule.factor(9, 110) == schedule.factor(10, 110) == pytest.approx(1.0)
    assert schedule.factor(60, 110) == pytest.approx(0.55)
    assert schedule.factor(35, 110) == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * math.sqrt(0.5)))
    assert schedule.factor(110, 110) == schedule.factor(500, 110) == pytest.approx(0.1)
    falling = [schedule.factor(step, 110) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_warmup_stable_decay_values() -> None:
    schedule = WarmupStableDecay(warmup=4, decay=0.25, final=0.2)
    assert [schedule.factor(step, 40) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert {schedule.factor(step, 40) for step in range(4, 31)} == {1.0}
    assert schedule.factor(35, 40) == pytest.approx(0.2 + 0.8 * 0.5)
    assert schedule.factor(39, 40) == pytest.approx(0.2 + 0.8 * 0.1)
    assert schedule.factor(40, 40) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", [Cosine(), WarmupStableDecay(), WarmupStableDecay(decay=0)])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_short_runs_have_a_rate_at_every_step(schedule: LearningRate, steps: int) -> None:
    factors = [schedule.factor(step, steps) for step in range(steps)]
    assert factors[0] == 1.0
    assert all(0 < factor <= 1 for factor in factors)


# ---- average ------------------------------------------------------------------------------------


def test_the_average_follows_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(7, generator=generator))
    module = nn.ParameterList([parameter])
    average, expected = ExponentialMovingAverage(module, decay=0.6), parameter.detach().double()
    for n in range(1, 30):
        with torch.no_grad():
            parameter.copy_(torch.randn(7, generator=generator))
        average.update()
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * parameter.detach().double()
        torch.testing.assert_close(average.averages[0].double(), expected, atol=1e-6, rtol=1e-6)


def test_without_a_decay_nothing_is_kept(tmp_path: Path) -> None:
    module = nn.Linear(300, 200)
    average = ExponentialMovingAverage(module, decay=0.0)
    assert average.averages == []
    torch.save(average.state_dict(), tmp_path / "average.pt")
    assert (tmp_path / "average.pt").stat().st_size < 2000
    with torch.no_grad():
        module.weight.add_(1.0)
    trained = module.weight.detach().clone()
    average.update()
    with average.applied():
        assert torch.equal(module.weight, trained)
    average.copy_to_parameters()
    assert torch.equal(module.weight, trained)
    average.load_state_dict(torch.load(tmp_path / "average.pt"))
    kept = ExponentialMovingAverage(module, decay=0.9)
    with pytest.raises(RuntimeError, match="an average of 2 tensors, with this ema there are 0"):
        average.load_state_dict(kept.state_dict())
    with pytest.raises(RuntimeError, match="an average of 0 tensors, with this ema there are 2"):
        kept.load_state_dict(average.state_dict())


def test_the_average_of_half_precision_is_float32() -> None:
    module = nn.Linear(2, 2).to(torch.bfloat16)
    average = ExponentialMovingAverage(module, decay=0.999)
    assert {one.dtype for one in average.averages} == {torch.float32}
    average.update()
    with average.applied():
        assert module.weight.dtype == torch.bfloat16


def test_applied_puts_the_average_in_place_and_takes_it_out_again() -> None:
    module = nn.Linear(3, 2)
    average = ExponentialMovingAverage(module, decay=0.5)
    old = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    average.update()
    new = module.weight.detach().clone()
    with average.applied():
        assert not torch.equal(module.weight, new)
        assert not torch.equal(module.weight, old)
    assert torch.equal(module.weight, new)
    with pytest.raises(KeyError), average.applied():  # also where what is inside fails
        raise KeyError
    assert torch.equal(module.weight, new)
    assert module.weight.requires_grad
    average.copy_to_parameters()
    torch.testing.assert_close(module.weight.detach(), average.averages[0])


def test_the_average_goes_on_from_its_state(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    first, second = (ExponentialMovingAverage(module, decay=0.9) for _ in range(2))
    with torch.no_grad():
        module.weight.add_(1.0)
    first.update()
    torch.save(first.state_dict(), tmp_path / "average.pt")
    second.load_state_dict(torch.load(tmp_path / "average.pt"))
    for average in (first, second):
        average.update()
    assert all(torch.equal(a, b) for a, b in zip(first.averages, second.averages, strict=True))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_outside_its_range(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay {decay} is outside"):
        ExponentialMovingAverage(nn.Linear(1, 1), decay=decay)
