"""What a policy is kept near to: the model that it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

from torch import nn

from mmdlm.core.denoiser import Denoiser
from mmdlm.models.auto import PretrainedDenoiser


class Reference:
    """The model before training: a frozen copy, or the policy itself without its adapter.

    Args:
        denoiser: The policy, before its first update.
        adapted: Whether the policy has an adapter, beside weights that stay.
        needed: Whether anything asks for the reference.
    """

    def __init__(self, denoiser: PretrainedDenoiser, *, adapted: bool, needed: bool) -> None:
        self.copy: PretrainedDenoiser | None = None
        if needed and not adapted:
            self.copy = deepcopy(denoiser).requires_grad_(False).eval()

    @contextmanager
    def of(self, policy: nn.Module) -> Iterator[Denoiser]:
        """Within the block, the reference of the policy."""
        if self.copy is not None:
            yield self.copy
            return
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [one for one in policy.modules() if isinstance(one, BaseTunerLayer)]
        assert layers, "a reference without a copy needs an adapter"
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield policy  # type: ignore[misc]
        finally:
            for layer in layers:
                layer.enable_adapters(True)
