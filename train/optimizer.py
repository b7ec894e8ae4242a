"""How parameters move: optimizers, learning rate over the run, and the running average."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmdlm.core.kernels.precision import fast_dtype

NOT_DECAYED = (nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
Rates = Mapping[nn.Parameter, float]  # peak learning rates of some parameters
NO_RATES: Rates = MappingProxyType({})


class LearningRate(ABC):
    """Learning rate over the run, as a share of its peak."""

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """Share of the peak at a 0-based step of a run of `steps`."""


@dataclass(frozen=True)
class Cosine(LearningRate):
    """Linear warm-up over `warmup` steps, then half a cosine down to `final`."""

    warmup: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_schedule(warmup=self.warmup, final=self.final)

    def factor(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class WarmupStableDecay(LearningRate):
    """Linear warm-up, a plateau, and a linear fall to `final` over the last `decay` of the run.

    Source: arXiv:2404.06395, section 4.
    """

    warmup: int = 0
    decay: float = 0.2
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_schedule(warmup=self.warmup, final=self.final, decay=self.decay)

    def factor(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        falling = round(steps * self.decay)
        left = (steps - step) / max(1, falling)
        return self.final + (1 - self.final) * min(1.0, left)


def _check_schedule(*, warmup: int, **shares: float) -> None:
    """Raise ValueError for a warm-up below 0, and for a share that is none."""
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}; it must be 0 steps or more")
    for name, value in shares.items():
        if not (0 <= value <= 1 or math.isnan(value)):  # which `checked` names
            raise ValueError(f"{name} is {value}; a share lies in [0, 1]")


class Optimizer(ABC):
    """How parameters move; YAML names one by class path.

    Attributes:
        state_bytes: That are kept of each number that learns, at least.
    """

    state_bytes: ClassVar[int] = 0

    @abstractmethod
    def build(self, module: nn.Module, *, rates: Rates = NO_RATES) -> list[torch.optim.Optimizer]:
        """Return torch optimizers that together hold each trainable parameter of a module once.

        Every parameter group carries its peak learning rate as `peak`: that of `rates` for the
        parameters that have one there, for all others the optimizer's own.
        """


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Fused AdamW; weight decay acts only on the weights of linear and convolution layers."""

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    eps: float = 1e-8

    state_bytes: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be 0 or more")

    def build(self, module: nn.Module, *, rates: Rates = NO_RATES) -> list[torch.optim.Optimizer]:
        return [self.of(*decay_groups(module), rates=rates)]

    def of(
        self, decayed: list[nn.Parameter], plain: list[nn.Parameter], *, rates: Rates = NO_RATES
    ) -> torch.optim.AdamW:
        """Return the optimizer of parameters that decay and of parameters that do not."""
        groups = [
            {"params": alike, "weight_decay": decay, "lr": peak, "peak": peak}
            for params, decay in ((decayed, self.weight_decay), (plain, 0.0))
            for peak, alike in self._by_peak(params, rates)
        ]
        return torch.optim.AdamW(
            groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True
        )

    def _by_peak(
        self, params: list[nn.Parameter], rates: Rates
    ) -> list[tuple[float, list[nn.Parameter]]]:
        """Parameters by peak; those at the optimizer's own come first, as logs show it."""
        groups: dict[float, list[nn.Parameter]] = {self.learning_rate: []}
        for parameter in params:
            groups.setdefault(rates.get(parameter, self.learning_rate), []).append(parameter)
        return [(peak, alike) for peak, alike in groups.items() if alike]


@dataclass(frozen=True)
class Muon(Optimizer):
    """Orthogonalised momentum for the matrices of the repeated layers, AdamW for all the rest.

    An update is the momentum with its singular values pushed to one by a Newton-Schulz iteration,
    times sqrt(max(1, rows / columns)). Source: arXiv:2502.16982, section 2.1 (the method, and its
    coefficients); the factor is the method's first, not that paper's. It iterates in bfloat16 where
    the hardware multiplies it, else in float32, where torch.optim.Muon always takes bfloat16: other
    CPUs do such products many times slower.

    What has a learning rate of its own is left to AdamW, whose rates mean another size of step: a
    vision tower, trained by AdamW before, stays with it.
    """

    state_bytes: ClassVar[int] = 4

    learning_rate: float = 0.02
    momentum: float = 0.95
    weight_decay: float = 0.0
    iterations: int = 5
    rest: AdamW = field(default_factory=AdamW)

    def build(self, module: nn.Module, *, rates: Rates = NO_RATES) -> list[torch.optim.Optimizer]:
        inner = {
            id(layer.weight)
            for stack in module.modules()
            if isinstance(stack, nn.ModuleList | nn.Sequential)
            for layer in stack.modules()
            if isinstance(layer, nn.Linear) and layer.in_features > 1
            if _is_repeated(stack)
        }
        decayed, plain = decay_groups(module)
        inner -= {id(parameter) for parameter in rates}
        matrices = [p for p in decayed if id(p) in inner]
        rest = self.rest.of([p for p in decayed if id(p) not in inner], plain, rates=rates)
        if not matrices:
            return [rest]
        groups = [{"params": matrices, "peak": self.learning_rate}]
        return [
            OrthogonalMomentum(
                groups,
                lr=self.learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                iterations=self.iterations,
            ),
            rest,
        ]


class OrthogonalMomentum(torch.optim.Optimizer):
    """The torch optimizer behind `Muon`; every parameter is a matrix."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        iterations: int,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "iterations": iterations})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient; those of one shape are iterated together."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for parameters in alike.values():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    gradient = parameter.grad
                    assert gradient is not None  # those without one are not among `alike`
                    state["momentum"].lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(state["momentum"], group["momentum"]))
                rows, columns = parameters[0].shape
                size = group["lr"] * math.sqrt(max(1.0, rows / columns))
                moved = orthogonalise(torch.stack(updates), iterations=group["iterations"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(moved.unbind(0)), alpha=-size)


def orthogonalise(matrices: Tensor, *, iterations: int) -> Tensor:
    """[N, R, C] -> [N, R, C] with the same singular vectors and singular values near one.

    The quintic Newton-Schulz iteration X <- a X + (b A + c A^2) X with A = X X^T; its coefficients
    favor a steep slope at zero over exact ones (values end between 0.7 and 1.2).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(fast_dtype(matrices.device))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.to(matrices.dtype)
    return x.mT if tall else x


def decay_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters to decay, and those not to: biases, norms, embeddings, positions.

    Told by the module that owns the parameter, not by its name; each parameter is in one group, a
    tied one in the group of its embedding.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    undecayed = {
        id(parameter)
        for owner in module.modules()
        for parameter in owner.parameters(recurse=False)
        if isinstance(owner, NOT_DECAYED) or parameter.ndim < 2 or not _is_layer(owner)
    }
    for parameter in module.parameters():
        if parameter.requires_grad:
            (plain if id(parameter) in undecayed else decayed).append(parameter)
    return decayed, plain


def _is_repeated(stack: nn.ModuleList | nn.Sequential) -> bool:
    """Whether a container holds copies of one kind of layer, as the depth of a Transformer does."""
    kinds = {type(layer) for layer in stack}
    return len(kinds) == 1 and not isinstance(next(iter(stack)), nn.Linear)


def _is_layer(owner: nn.Module) -> bool:
    return isinstance(getattr(owner, "weight", None), nn.Parameter)


class ExponentialMovingAverage:
    """A float32 running average of the trainable parameters; what is sampled from and shipped.

    Where parameters are sharded, each process averages its own part.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that early, bad
    weights are soon forgotten. With a decay of 0 the average is the parameters as they are: nothing
    is kept, computed or saved.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} is outside [0, 1)")
        self.decay, self.updates = decay, 0
        self.parameters = [p for p in module.parameters() if p.requires_grad and decay > 0]
        self.averages = [p.float().clone() for p in self._values()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters as they are now."""
        self.updates += 1
        if not self.averages:
            return
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, [p.float() for p in self._values()], 1 - keep)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Overwrite the parameters with their averages."""
        for value, average in zip(self._values(), self.averages, strict=True):
            value.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters hold their averages."""
        trained = [value.clone() for value in self._values()]
        self.copy_to_parameters()
        try:
            yield
        finally:
            for value, before in zip(self._values(), trained, strict=True):
                value.copy_(before)

    def _values(self) -> list[Tensor]:
        """Return the parameters' own memory, as plain tensors."""
        values = (p.detach() for p in self.parameters)
        return [v.to_local() if isinstance(v, DTensor) else v for v in values]

    def state_dict(self) -> dict[str, object]:
        """Everything that `load_state_dict` needs to go on as before."""
        return {"updates": self.updates, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from a saved average; RuntimeError where it is not of as many parameters."""
        saved: list[Tensor] = state["averages"]  # type: ignore[assignment]
        if len(saved) != len(self.averages):
            raise RuntimeError(
                f"it holds an average of {len(saved)} tensors, with this ema there are "
                f"{len(self.averages)}"
            )
        self.updates = int(state["updates"])  # type: ignore[call-overload]
        for average, value in zip(self.averages, saved, strict=True):
            average.copy_(value)
