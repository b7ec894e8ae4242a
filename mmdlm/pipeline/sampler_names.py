"""Name the orders, schedules and caches that plain values can choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from mmdlm.core.diffusion.schedule import Cosine, Shifted
from mmdlm.core.sampling.cache import Cache, Delayed, Dual, FinishedBlocks, Prefix, Prompt, Stable
from mmdlm.core.sampling.order import (
    Confidence,
    Entropy,
    LeftToRight,
    Margin,
    Order,
    Probability,
    Random,
)
from mmdlm.core.sampling.unmasking import (
    Ancestral,
    PlannedTransfer,
    ScheduledTransfer,
    UniformTransfer,
    UnmaskingRule,
)

OrderName = Literal["confidence", "probability", "margin", "entropy", "random", "left_to_right"]
DecayName = Literal["linear", "compounding", "none"]
CacheName = Literal["prompt", "prefix", "dual", "delayed", "stable", "blocks"]
ScheduleName = Literal["linear", "cosine", "shifted", "ancestral"]
RANKED = ("confidence", "probability", "margin", "entropy")  # orders that may have noise
CACHES: Mapping[str, type[Cache]] = {
    "prompt": Prompt,
    "prefix": Prefix,
    "dual": Dual,
    "delayed": Delayed,
    "stable": Stable,
    "blocks": FinishedBlocks,
}
RULES: Mapping[str, Callable[[float], UnmaskingRule]] = {  # of the shift
    "linear": lambda _: UniformTransfer(),
    "cosine": lambda _: ScheduledTransfer(Cosine()),
    "shifted": lambda shift: PlannedTransfer(Shifted(shift)),
    "ancestral": lambda _: Ancestral(drawn=True),
}
ORDERS: Mapping[str, Callable[[float, DecayName], Order]] = {  # of its noise
    "confidence": Confidence,
    "probability": Probability,
    "margin": Margin,
    "entropy": Entropy,
    "random": lambda *_: Random(),
    "left_to_right": lambda *_: LeftToRight(),
}
