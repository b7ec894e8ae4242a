"""The names of a published checkpoint's tensors and ours: one to one, so that both can be had."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

_WILDCARD = {"{n}": r"(?P<n>\d+)", "{rest}": r"(?P<rest>.+)"}


@dataclass(frozen=True)
class WeightMap:
    """Pairs of names, theirs and ours, in which `{n}` is a layer's number and `{rest}` any ending.

    A checkpoint of a published family is nothing but other names for the tensors of the one
    Transformer: no tensor is transposed, split or joined, so that the way back is exact.
    """

    pairs: tuple[tuple[str, str], ...]

    def __add__(self, other: WeightMap) -> WeightMap:
        return WeightMap(self.pairs + other.pairs)

    @property
    def reversed(self) -> WeightMap:
        """From our names to theirs."""
        return WeightMap(tuple((ours, theirs) for theirs, ours in self.pairs))

    def __call__(self, name: str) -> str | None:
        """Their name -> ours; None for a tensor that the family does not have."""
        for pattern, template in self._patterns:
            if match := pattern.fullmatch(name):
                return template.format(**match.groupdict())
        return None

    def rename(self, names: Iterable[str]) -> dict[str, str]:
        """Their names -> ours, those that the map knows."""
        known = ((name, self(name)) for name in names)
        return {theirs: ours for theirs, ours in known if ours is not None}

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str]]:
        result = []
        for theirs, ours in self.pairs:
            pattern = re.escape(theirs)
            for wildcard, group in _WILDCARD.items():
                pattern = pattern.replace(re.escape(wildcard), group)
            result.append((re.compile(pattern), ours))
        return result


# The names that the Transformer has here, which are those of Llama, Qwen, Dream and LLaDA-V.
LLAMA_NAMES = WeightMap(
    tuple(
        (name, name)
        for name in (
            "model.embed_tokens.weight",
            "model.layers.{n}.{rest}",
            "model.norm.weight",
            "lm_head.weight",
        )
    )
)

# OLMo's, which LLaDA took over: the head and the down-projection are both called ff_out.
OLMO_NAMES = WeightMap(
    (
        ("model.transformer.wte.weight", "model.embed_tokens.weight"),
        ("model.transformer.ln_f.weight", "model.norm.weight"),
        ("model.transformer.ff_out.weight", "lm_head.weight"),
        *(
            (f"model.transformer.blocks.{{n}}.{theirs}", f"model.layers.{{n}}.{ours}")
            for theirs, ours in (
                ("attn_norm.weight", "input_layernorm.weight"),
                ("q_proj.{rest}", "self_attn.q_proj.{rest}"),
                ("k_proj.{rest}", "self_attn.k_proj.{rest}"),
                ("v_proj.{rest}", "self_attn.v_proj.{rest}"),
                ("attn_out.weight", "self_attn.o_proj.weight"),
                ("ff_norm.weight", "post_attention_layernorm.weight"),
                ("ff_proj.weight", "mlp.gate_proj.weight"),
                ("up_proj.weight", "mlp.up_proj.weight"),
                ("ff_out.weight", "mlp.down_proj.weight"),
            )
        ),
    )
)

# What LLaVA and its descendants call the parts that see.
LLAVA_NAMES = WeightMap(
    (
        ("model.vision_tower.vision_tower.vision_model.{rest}", "vision.tower.{rest}"),
        ("model.mm_projector.{rest}", "vision.projector.{rest}"),
        ("model.image_newline", "vision.newline"),
    )
)
