"""Name the published samplers that a `GenerationConfig` can reproduce."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mmdlm.core.diffusion.schedule import Cosine, Shifted
from mmdlm.core.sampling.unmasking import (
    Ancestral,
    CatchUpTransfer,
    PlannedTransfer,
    ScheduledTransfer,
    UniformTransfer,
    UnmaskingRule,
)

PresetName = Literal["llada", "mmada", "lumina", "dream", "dimple", "lavida", "sdar", "fast_dllm"]


@dataclass(frozen=True)
class Preset:
    """What a published sampler does that no option of `GenerationConfig` says.

    Steps, temperatures, order, thresholds and blocks are options; a preset leaves them as they are.

    Attributes:
        unmasking: How many tokens a step commits, unless the config has a schedule.
        score_after_temperature: The order looks at the probabilities that tokens are drawn from.
        top_p_first: Top-p is taken of all ids and top-k of what is left.
        first_alone: The first token of a block is one by itself, see `Sampler`.
        full_vocabulary: With `published_defects`: a text position may become any id.
        allow_mask_token: With `published_defects`: the mask token may be drawn.
        compounding: With `published_defects`: the noise of the order is multiplied from step to
            step.
    """

    unmasking: UnmaskingRule
    score_after_temperature: bool = False
    top_p_first: bool = False
    first_alone: bool = False
    full_vocabulary: bool = False
    allow_mask_token: bool = False
    compounding: bool = False


_ANY_ID = {"full_vocabulary": True, "allow_mask_token": True}
# MaskGIT's cosine, counted in single precision as published code does.
_MASKGIT = ScheduledTransfer(Cosine(), least=1, strict=True)

PRESETS: Mapping[PresetName, Preset] = {
    # arXiv:2502.09992
    "llada": Preset(UniformTransfer(), **_ANY_ID),
    # arXiv:2505.15809
    "mmada": Preset(_MASKGIT, compounding=True, **_ANY_ID),
    # arXiv:2510.06308
    "lumina": Preset(_MASKGIT),
    # arXiv:2508.15487
    "dream": Preset(Ancestral(), score_after_temperature=True, top_p_first=True, **_ANY_ID),
    # arXiv:2505.16990
    "dimple": Preset(CatchUpTransfer(), top_p_first=True, **_ANY_ID),
    # arXiv:2505.16839, section 3.4
    "lavida": Preset(PlannedTransfer(Shifted(1 / 3))),
    # arXiv:2510.06303
    "sdar": Preset(UniformTransfer(), score_after_temperature=True, **_ANY_ID),
    # arXiv:2509.26328
    "fast_dllm": Preset(
        UniformTransfer(), score_after_temperature=True, first_alone=True, **_ANY_ID
    ),
}
