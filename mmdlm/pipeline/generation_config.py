"""Hold how a model fills its targets: steps, order, schedule, speed-ups, cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mmdlm.core.sampling.cache import Cache
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import Order
from mmdlm.core.sampling.remasking import Remasking
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import (
    EntropyBound,
    Factor,
    Threshold,
    UniformTransfer,
    UnmaskingRule,
)
from mmdlm.pipeline.checks import (
    check_choice,
    check_flag,
    check_ids,
    check_not_negative,
    check_number,
    check_whole_number,
)
from mmdlm.pipeline.presets import PRESETS, Preset, PresetName
from mmdlm.pipeline.sampler_names import (
    CACHES,
    ORDERS,
    RANKED,
    RULES,
    CacheName,
    DecayName,
    OrderName,
    ScheduleName,
)

MOST_STEPS = 100_000  # of denoising: far more than any model has tokens
PARALLEL = ("threshold", "factor", "entropy_bound")


@dataclass(frozen=True)
class GenerationConfig:
    """The sampler of one task in plain values, so that a checkpoint can carry it.

    Names stand for classes of `mmdlm.core`: downloaded weights must not choose imports. What is
    given in Python, in the YAML of a recipe or on a command line may be an object of a class of
    one's own, named there by its class path; a checkpoint cannot carry it.

    Attributes:
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is off; several numbers for several branches.
        temperature: Of the draw of tokens; 0 takes the most likely one.
        top_k: Draw from this many most likely ids only.
        top_p: Draw from the most likely ids that have this probability together only.
        suppress_tokens: Ids that are never generated.
        deprioritized_ids: Ids that the order does not see, see `Sampler`.
        min_new_tokens: A text does not end before so many tokens.
        block_length: Finish this many tokens before the next are begun; None: all at once, or the
            blocks that the model was trained with, which a smaller number cuts further.
        remask: Share of committed tokens that a step may take back; 0 is off.
        order: Which tokens are committed first: a name, or an `Order` of one's own.
        order_temperature: Noise in an order by what the model is sure of, which makes images more
            varied.
        order_decay: Of that noise, see `mmdlm.core.sampling.order.Ranked`.
        schedule: How many tokens a step commits: "linear" the same number each; "cosine" few at
            first; "shifted" few at first or many; "ancestral" each open token on its own, by the
            reverse process; or an `UnmaskingRule` of one's own. None: that of `reproduce`, or else
            "linear".
        shift: Of "shifted": above 1 few tokens at first, below 1 many.
        threshold: Commit every token of at least this probability as well; None: do not.
        threshold_exclusive: In such a step commit only those.
        factor: As `threshold`, but the more tokens at once, the surer each has to be, see
            `mmdlm.core.sampling.unmasking.Factor`.
        entropy_bound: As `threshold`, by entropies, in nats, see `EntropyBound` there. At most one
            of these three.
        in_order: Of the tokens so found sure, commit those that stand in the order before all that
            are not.
        distinct: Of several sure tokens of one word commit only the first in the order.
        cache: What a step keeps of the steps before, faster and a little less exact: "prompt" only
            that (exact for a model with prefix_attention), "prefix" what lies before the block,
            "dual" all but the block, "delayed" tokens a step after they were committed, "stable"
            what the model is sure of (images), "blocks" the finished blocks of a model of block
            diffusion (exact); None: nothing, the exact result; or a `Cache` of one's own.
        cache_refresh: Compute everything again every so many steps; None: as the cache has it.
        reproduce: A published sampler to reproduce, see `mmdlm.pipeline.presets`: how many tokens
            its steps commit, and how it takes temperature, top-k and top-p; None: ours.
        published_defects: Reproduce as well what its code does wrong: a text may get any id, the
            mask token may be drawn, noise may compound.
    """

    num_inference_steps: int
    guidance_scale: float | tuple[float, ...] = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    suppress_tokens: tuple[int, ...] = ()
    deprioritized_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    block_length: int | None = None
    remask: float = 0.0
    # order: which tokens first
    order: OrderName | Order = "confidence"
    order_temperature: float = 0.0
    order_decay: DecayName = "linear"
    # schedule: how many tokens in a step
    schedule: ScheduleName | UnmaskingRule | None = None
    shift: float = 3.0
    # parallel: more tokens in a step, where the model is sure
    threshold: float | None = None
    threshold_exclusive: bool = False
    factor: float | None = None
    entropy_bound: float | None = None
    in_order: bool = False
    distinct: bool = False
    # cache: what a step keeps of the steps before
    cache: CacheName | Cache | None = None
    cache_refresh: int | None = None
    # a published sampler
    reproduce: PresetName | None = None
    published_defects: bool = False

    def __post_init__(self) -> None:
        """Check the values one by one, then those of each section together."""
        for name in ("guidance_scale", "suppress_tokens", "deprioritized_ids"):
            if isinstance(getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_values()
        self._check_order()
        self._check_schedule()
        self._check_parallel()
        self._check_cache()
        self._check_preset()
        self.sampler()  # it checks the ranges

    def _check_values(self) -> None:
        check_whole_number("num_inference_steps", self.num_inference_steps, least=1)
        if self.num_inference_steps > MOST_STEPS:
            raise ValueError(
                f"num_inference_steps must be at most {MOST_STEPS:,}, got "
                f"{self.num_inference_steps}"
            )
        for name in ("top_k", "block_length", "cache_refresh"):
            if getattr(self, name) is not None:
                check_whole_number(name, getattr(self, name), least=1)
        check_whole_number("min_new_tokens", self.min_new_tokens, least=0)
        for name in ("temperature", "order_temperature", "shift", "remask"):
            check_not_negative(name, getattr(self, name))
        for name in ("top_p", *PARALLEL):
            if getattr(self, name) is not None:
                check_not_negative(name, getattr(self, name))
        scales = self.guidance_scale
        for value in scales if isinstance(scales, tuple) and scales else (scales,):
            check_number("guidance_scale", value)
        for name in ("suppress_tokens", "deprioritized_ids"):
            check_ids(name, getattr(self, name))
        for name in ("threshold_exclusive", "in_order", "distinct", "published_defects"):
            check_flag(name, getattr(self, name))

    def _check_order(self) -> None:
        if not isinstance(self.order, Order):
            check_choice("order", self.order, OrderName)
        check_choice("order_decay", self.order_decay, DecayName)
        if self.order_temperature and self.order not in RANKED:
            raise ValueError(
                f"order_temperature {self.order_temperature} is noise on what the model is sure "
                f"of, which order {self.order!r} does not look at; set it to 0"
            )

    def _check_schedule(self) -> None:
        if self.schedule is not None and not isinstance(self.schedule, UnmaskingRule):
            check_choice("schedule", self.schedule, ScheduleName)
        if self.shift != GenerationConfig.shift and self.schedule != "shifted":
            raise ValueError(
                f"shift {self.shift} belongs to schedule 'shifted', not to "
                f"{'linear' if self.schedule is None else self.schedule!r}; leave it out"
            )

    def _check_parallel(self) -> None:
        parallel = [name for name in PARALLEL if getattr(self, name) is not None]
        for name in ("in_order", "distinct"):
            if getattr(self, name) and not parallel:
                raise ValueError(f"{name} needs one of {', '.join(PARALLEL)}; give one")
        if len(parallel) > 1:
            raise ValueError(f"{' and '.join(parallel)} exclude each other; give one of them")
        if self.entropy_bound is not None and (self.order != "entropy" or self.order_temperature):
            raise ValueError(
                f"entropy_bound {self.entropy_bound} needs order 'entropy' without noise, not "
                f"{self.order!r} with order_temperature {self.order_temperature}"
            )
        if self.threshold is not None and self.threshold > 1:
            raise ValueError(f"threshold must lie in [0, 1], got {self.threshold}")
        if self.threshold_exclusive and self.threshold is None:
            raise ValueError("threshold_exclusive needs a threshold; give one, or leave it out")

    def _check_cache(self) -> None:
        if self.cache is None:
            if self.cache_refresh is not None:
                raise ValueError(f"cache_refresh {self.cache_refresh} needs a cache; name one")
        elif not isinstance(self.cache, Cache):
            check_choice("cache", self.cache, CacheName)

    def _check_preset(self) -> None:
        if self.reproduce is not None:
            check_choice("reproduce", self.reproduce, PresetName)
        elif self.published_defects:
            raise ValueError(
                "published_defects needs a published sampler; name one by reproduce, or leave it "
                "out"
            )

    def sampler(self, *, suppress_tokens: tuple[int, ...] = ()) -> Sampler:
        """Return the sampler that these values describe.

        Args:
            suppress_tokens: Further ids that are never generated.

        Returns:
            A sampler without any reference to this config.
        """
        preset = self._preset()
        return Sampler(
            steps=self.num_inference_steps,
            block_length=self.block_length,
            order=self._order(preset),
            unmasking=self._unmasking(preset),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            guidance=ClassifierFreeGuidance(self.guidance_scale),
            remask=Remasking(self.remask) if self.remask else None,
            cache=self._cache(),
            min_new_tokens=self.min_new_tokens,
            suppress_tokens=(*self.suppress_tokens, *suppress_tokens),
            deprioritized_ids=self.deprioritized_ids,
            score_after_temperature=preset.score_after_temperature,
            top_p_first=preset.top_p_first,
            first_alone=preset.first_alone,
            full_vocabulary=self.published_defects and preset.full_vocabulary,
            allow_mask_token=self.published_defects and preset.allow_mask_token,
        )

    def _preset(self) -> Preset:
        return Preset(UniformTransfer()) if self.reproduce is None else PRESETS[self.reproduce]

    def _order(self, preset: Preset) -> Order:
        if isinstance(self.order, Order):
            return self.order
        compounding = self.published_defects and preset.compounding
        decay: DecayName = "compounding" if compounding else self.order_decay
        return ORDERS[self.order](self.order_temperature, decay)

    def _unmasking(self, preset: Preset) -> UnmaskingRule:
        """Return the rule of the schedule, within that of the parallel section."""
        if self.schedule is None:
            rule = preset.unmasking
        elif isinstance(self.schedule, UnmaskingRule):
            rule = self.schedule
        else:
            rule = RULES[self.schedule](self.shift)
        sure: dict[str, Any] = {
            "fallback": rule,
            "in_order": self.in_order,
            "distinct": self.distinct,
        }
        if self.threshold is not None:
            return Threshold(self.threshold, exclusive=self.threshold_exclusive, **sure)
        if self.factor is not None:
            return Factor(self.factor, **sure)
        if self.entropy_bound is not None:
            return EntropyBound(self.entropy_bound, **sure)
        return rule

    def _cache(self) -> Cache | None:
        if self.cache is None:
            return None
        cache = self.cache if isinstance(self.cache, Cache) else CACHES[self.cache]()
        return cache if self.cache_refresh is None else replace(cache, refresh=self.cache_refresh)
