"""Layers handed to torch.compile: one is compiled, and serves the whole depth."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
import torch._dynamo
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

Mode = Literal["default", "reduce-overhead", "max-autotune"]
# Graphs that one layer may have. Reinforcement learning needs about 20: a layer is called with and
# without gradients, dropout, recomputing and adapter, masked or not, for all places or for some,
# and what changes in size is found out as it changes. torch's 8 are spent within the first round,
# after which it compiles nothing any more and says so only in its log.
GRAPHS = 64
logger = logging.getLogger(__name__)


def compile_layers(denoiser: nn.Module, *, mode: Mode = "default") -> None:
    """Compile the repeated layers where they stand; the first calls say so, and take minutes.

    Raises torch's limit of graphs, which holds for the whole process, where it is below `GRAPHS`.

    Args:
        denoiser: The model; it is changed.
        mode: Of torch.compile: "reduce-overhead" records CUDA graphs, for shapes that do not
            change.
    """
    layers = [one for one in denoiser.modules() if isinstance(one, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(mode=mode)
    if not layers:
        return
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
    _say_so(layers[0])
    if mode != "default":
        _begin_passes(layers[0])


def _say_so(layer: nn.Module) -> None:
    """Once, when the layer is first called."""

    def say(module: nn.Module, given: Any) -> None:
        handle.remove()
        logger.warning("compiling the layers: the first calls take a minute or two")

    handle = layer.register_forward_pre_hook(say)


def _begin_passes(layer: nn.Module) -> None:
    """Tell CUDA graphs where a pass through the layers begins: at the first of them.

    Until then they lend what they gave; on their own they would take it back at the next layer. A
    pass of sampling goes through it once; training compiles in the default mode.
    """
    compiled = layer._compiled_call_impl
    assert compiled is not None

    def begin(*given: Any, **named: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*given, **named)

    layer._compiled_call_impl = begin
