"""From the width of a vision tower to that of the language model."""

from __future__ import annotations

import re

from torch import nn

LINEAR, MLP = "linear", re.compile(r"mlp([1-9]\d*)x_(gelu|silu)")


def build_projector(name: str, tower_width: int, width: int) -> nn.Module:
    """Build a projector by the name that LLaVA gives it, [..., D_tower] -> [..., D].

    "linear" is one matrix with a bias; "mlp2x_gelu" is two of them with an exact GELU between, and
    so on for any number; "mlp2x_silu" has SiLUs instead. The tensors have LLaVA's names: `weight`
    and `bias`, or `0.weight`, `2.weight`, ... for an MLP. Raises ValueError for another name.

    Source: arXiv:2310.03744, section 3.3.
    """
    check_projector(name)
    if name == LINEAR:
        return nn.Linear(tower_width, width)
    match = MLP.fullmatch(name)
    assert match is not None
    layers: list[nn.Module] = [nn.Linear(tower_width, width)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU() if match[2] == "gelu" else nn.SiLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)


def check_projector(name: object) -> None:
    """Raise ValueError unless it is the name of a projector."""
    if name != LINEAR and (not isinstance(name, str) or MLP.fullmatch(name) is None):
        raise ValueError(
            f"unknown projector {name!r}; take 'linear', 'mlp2x_gelu', 'mlp2x_silu' or another "
            "'mlpNx_gelu' or 'mlpNx_silu'"
        )
