"""How a model fills its targets when the caller does not say: one record for each task."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

from mmdlm.core.diffusion.schedule import Cosine, Shifted
from mmdlm.core.sampling.cache import Cache, Delayed, Dual, Prefix, Prompt, Stable
from mmdlm.core.sampling.guidance import ClassifierFreeGuidance
from mmdlm.core.sampling.order import (
    Confidence,
    Entropy,
    LeftToRight,
    Margin,
    Order,
    Probability,
    Random,
)
from mmdlm.core.sampling.remasking import Remasking
from mmdlm.core.sampling.sampler import Sampler
from mmdlm.core.sampling.unmasking import (
    Ancestral,
    CatchUpTransfer,
    EntropyBound,
    Factor,
    PlannedTransfer,
    ScheduledTransfer,
    Threshold,
    UniformTransfer,
    UnmaskingRule,
)
from mmdlm.vision.checkpoint_files import reason_of
from mmdlm.vision.known_names import suggestion
from mmdlm.vision.pixels import Fit

GENERATION = "generation_config.json"  # where a checkpoint carries its own defaults

OrderName = Literal["confidence", "probability", "margin", "entropy", "random", "left_to_right"]
DecayName = Literal["linear", "compounding", "none"]
CacheName = Literal["prompt", "prefix", "dual", "delayed", "stable"]
MOST_STEPS = 100_000  # of denoising: far more than any model has tokens
RANKED = ("confidence", "probability", "margin", "entropy")  # orders that may have noise
PARALLEL = ("threshold", "factor", "entropy_bound")
ScheduleName = Literal[
    "linear", "cosine", "maskgit", "shifted", "expected", "ancestral", "catch_up"
]


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def _check_choice(name: str, value: object, choices: Any) -> None:
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(map(repr, known))}")


@dataclass(frozen=True)
class GenerationConfig:
    """The sampler of one task in plain values, so that a checkpoint can carry it.

    Names stand for classes of `mmdlm.core`: downloaded weights must not choose imports. What is
    given in Python, in the YAML of a recipe or on a command line may be an object of a class of
    one's own, named there by its class path; a checkpoint cannot carry it.

    num_inference_steps  denoising steps
    guidance_scale       classifier-free guidance; 1 is off; several numbers for several branches
    temperature          of the draw of tokens; 0 takes the most likely one
    top_k, top_p         restrict the draw
    order                which tokens are committed first: a name, or an `Order` of one's own
    order_temperature    noise in an order by what the model is sure of, which makes images more
                         varied
    order_decay          of that noise, see `mmdlm.core.sampling.order.Ranked`
    schedule             how many tokens a step commits: "linear" the same number each; "cosine" few
                         at first; "maskgit" as "cosine", counted as published code does (MMaDA,
                         Lumina-DiMOO); "shifted" few at first or many (LaViDa); "expected" and
                         "ancestral" a share of what is open (Dream, its "origin"); "catch_up" the
                         next number of a linear schedule below what is open (Dimple); or a
                         `UnmaskingRule` of one's own
    shift                of "shifted": above 1 few tokens at first, below 1 many
    threshold            commit every token of at least this probability besides; None: do not
    threshold_exclusive      and in such a step only those
    factor               as `threshold`, but the more tokens at once the surer each has to be, see
                         `mmdlm.core.sampling.unmasking.Factor`
    entropy_bound        as `threshold`, by entropies, in nats, see `EntropyBound` there. Of these
                         three one at most
    in_order             of the tokens so found sure, those that stand in the order before all that
                         are not
    distinct             of several sure tokens of one word the first in the order alone
    cache                what a step remembers of the steps before, faster and a little less exact:
                         "prompt" that alone (exact for a model with prefix_attention), "prefix"
                         what lies before the block, "dual" all but the block, "delayed" tokens a
                         step after they were committed, "stable" what the model is sure of
                         (images); None: nothing, the exact result; or a `Cache` of one's own
    cache_refresh        compute all anew every so many steps; None: as the cache has it
    block_length         finish this many tokens before the next are begun; None: all at once
    min_new_tokens       a text does not end before so many tokens
    remask               share of committed tokens that a step may take back; 0 is off
    suppress_tokens           ids that are never generated
    deprioritized_ids, score_after_temperature, top_p_first, full_vocabulary, allow_mask_token: see
    `Sampler`
    """

    num_inference_steps: int
    guidance_scale: float | tuple[float, ...] = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    order: OrderName | Order = "confidence"
    order_temperature: float = 0.0
    order_decay: DecayName = "linear"
    score_after_temperature: bool = False
    top_p_first: bool = False
    schedule: ScheduleName | UnmaskingRule = "linear"
    shift: float = 3.0
    threshold: float | None = None
    threshold_exclusive: bool = False
    factor: float | None = None
    entropy_bound: float | None = None
    in_order: bool = False
    distinct: bool = False
    cache: CacheName | Cache | None = None
    cache_refresh: int | None = None
    block_length: int | None = None
    min_new_tokens: int = 0
    remask: float = 0.0
    suppress_tokens: tuple[int, ...] = ()
    deprioritized_ids: tuple[int, ...] = ()
    full_vocabulary: bool = False
    allow_mask_token: bool = False

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "suppress_tokens", "deprioritized_ids"):
            if isinstance(getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("num_inference_steps", "top_k", "block_length", "cache_refresh"):
            value = getattr(self, name)
            if value is None and name != "num_inference_steps":
                continue
            if not _is_whole(value) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.num_inference_steps > MOST_STEPS:
            raise ValueError(
                f"num_inference_steps must be at most {MOST_STEPS:,}, got "
                f"{self.num_inference_steps}"
            )
        if not _is_whole(self.min_new_tokens) or self.min_new_tokens < 0:
            raise ValueError(
                f"min_new_tokens must be a whole number of at least 0, got {self.min_new_tokens!r}"
            )
        maybe = ("top_p", "threshold", "factor", "entropy_bound")
        for name in ("temperature", "order_temperature", "shift", "remask", *maybe):
            value = getattr(self, name)
            if value is None and name in maybe:
                continue
            _check_number(name, value)
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value!r}")
        scales = self.guidance_scale
        for value in scales if isinstance(scales, tuple) and scales else (scales,):
            _check_number("guidance_scale", value)
        for name in ("suppress_tokens", "deprioritized_ids"):
            ids = getattr(self, name)
            if not isinstance(ids, tuple) or not all(_is_whole(i) and i >= 0 for i in ids):
                raise ValueError(f"{name} must be a list of token ids, got {ids!r}")
        for name in (
            "threshold_exclusive",
            "in_order",
            "distinct",
            "score_after_temperature",
            "top_p_first",
            "full_vocabulary",
            "allow_mask_token",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.order, Order):
            _check_choice("order", self.order, OrderName)
        _check_choice("order_decay", self.order_decay, DecayName)
        if not isinstance(self.schedule, UnmaskingRule):
            _check_choice("schedule", self.schedule, ScheduleName)
        if self.cache is not None:
            if not isinstance(self.cache, Cache):
                _check_choice("cache", self.cache, CacheName)
        elif self.cache_refresh is not None:
            raise ValueError(f"cache_refresh {self.cache_refresh} needs a cache; name one")
        for name in ("in_order", "distinct"):
            if getattr(self, name) and all(getattr(self, one) is None for one in PARALLEL):
                raise ValueError(f"{name} needs one of {', '.join(PARALLEL)}; give one")
        parallel = [name for name in PARALLEL if getattr(self, name) is not None]
        if len(parallel) > 1:
            raise ValueError(f"{' and '.join(parallel)} exclude each other; give one of them")
        if self.entropy_bound is not None and (self.order != "entropy" or self.order_temperature):
            raise ValueError(
                f"entropy_bound {self.entropy_bound} needs order 'entropy' without noise, not "
                f"{self.order!r} with order_temperature {self.order_temperature}"
            )
        if self.order_temperature and self.order not in RANKED:
            raise ValueError(
                f"order_temperature {self.order_temperature} is noise on what the model is sure "
                f"of, which order {self.order!r} does not look at; set it to 0"
            )
        if self.shift != GenerationConfig.shift and self.schedule != "shifted":
            raise ValueError(
                f"shift {self.shift} belongs to schedule 'shifted', not to {self.schedule!r}; "
                "leave it out"
            )
        if self.threshold is not None and self.threshold > 1:
            raise ValueError(f"threshold must lie in [0, 1], got {self.threshold}")
        if self.threshold_exclusive and self.threshold is None:
            raise ValueError("threshold_exclusive needs a threshold; give one, or leave it out")
        self.sampler()  # it checks the ranges

    def sampler(self, *, suppress_tokens: tuple[int, ...] = ()) -> Sampler:
        """The sampler that these values describe; more ids that are never generated."""
        noise = (self.order_temperature, self.order_decay)
        orders: dict[OrderName | Order, Order] = {
            "confidence": Confidence(*noise),
            "probability": Probability(*noise),
            "margin": Margin(*noise),
            "entropy": Entropy(*noise),
            "random": Random(),
            "left_to_right": LeftToRight(),
        }
        rules: dict[ScheduleName | UnmaskingRule, UnmaskingRule] = {
            "linear": UniformTransfer(),
            "cosine": ScheduledTransfer(Cosine()),
            "maskgit": ScheduledTransfer(Cosine(), least=1, strict=True),
            "shifted": PlannedTransfer(Shifted(self.shift)),
            "expected": Ancestral(),
            "ancestral": Ancestral(drawn=True),
            "catch_up": CatchUpTransfer(),
        }
        order = self.order if isinstance(self.order, Order) else orders[self.order]
        commit = self.schedule if isinstance(self.schedule, UnmaskingRule) else rules[self.schedule]
        sure: dict[str, Any] = {
            "fallback": commit,
            "in_order": self.in_order,
            "distinct": self.distinct,
        }
        if self.threshold is not None:
            commit = Threshold(self.threshold, exclusive=self.threshold_exclusive, **sure)
        elif self.factor is not None:
            commit = Factor(self.factor, **sure)
        elif self.entropy_bound is not None:
            commit = EntropyBound(self.entropy_bound, **sure)
        return Sampler(
            steps=self.num_inference_steps,
            block_length=self.block_length,
            order=order,
            unmasking=commit,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            guidance=ClassifierFreeGuidance(self.guidance_scale),
            remask=Remasking(self.remask) if self.remask else None,
            cache=self._cache(),
            min_new_tokens=self.min_new_tokens,
            suppress_tokens=(*self.suppress_tokens, *suppress_tokens),
            deprioritized_ids=self.deprioritized_ids,
            score_after_temperature=self.score_after_temperature,
            top_p_first=self.top_p_first,
            full_vocabulary=self.full_vocabulary,
            allow_mask_token=self.allow_mask_token,
        )

    def _cache(self) -> Cache | None:
        caches: dict[CacheName | Cache, Cache] = {
            "prompt": Prompt(),
            "prefix": Prefix(),
            "dual": Dual(),
            "delayed": Delayed(),
            "stable": Stable(),
        }
        if self.cache is None:
            return None
        cache = self.cache if isinstance(self.cache, Cache) else caches[self.cache]
        return cache if self.cache_refresh is None else replace(cache, refresh=self.cache_refresh)


@dataclass(frozen=True)
class Defaults:
    """What each task does unless told otherwise, and how images meet texts of any length.

    A checkpoint may carry its own in generation_config.json: {"caption": {"temperature": 0.5}};
    what is
    not there stays as it is here.

    fit              how an image meets the tokenizer's square, see `mmdlm.vision.pixels`
    max_text_tokens  length of a caption, its end included, where the checkpoint does not fix it
    max_new_tokens   length of an answer or a completion, for which their num_inference_steps are
    """

    text_to_image: GenerationConfig = GenerationConfig(
        12, guidance_scale=2.0, temperature=0.5, order_temperature=1.0, schedule="cosine"
    )
    inpaint: GenerationConfig = GenerationConfig(
        12, guidance_scale=2.0, temperature=0.5, order_temperature=1.0, schedule="cosine"
    )
    caption: GenerationConfig = GenerationConfig(16)
    infill: GenerationConfig = GenerationConfig(16)
    answer: GenerationConfig = GenerationConfig(128)
    complete: GenerationConfig = GenerationConfig(128)
    edit: GenerationConfig = GenerationConfig(
        12, guidance_scale=2.0, temperature=0.5, order_temperature=1.0, schedule="cosine"
    )
    fit: Fit = "pad"
    max_text_tokens: int = 64
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        _check_choice("fit", self.fit, Fit)
        tokens = self.max_text_tokens
        if not _is_whole(tokens) or tokens < 2:
            raise ValueError(f"max_text_tokens must be a whole number above 1, got {tokens!r}")
        if not _is_whole(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens must be a whole number of at least 1, got {self.max_new_tokens!r}"
            )

    def updated(self, generation: Mapping[str, Any]) -> Defaults:
        """Return them with the entries of a generation_config.json; ValueError for a bad entry."""
        result: Defaults = _updated(self, generation)
        return result

    def to_json(self) -> str:
        """Return the text of a generation_config.json.

        Raises ValueError for an order, schedule or cache of one's own, which has no name there.
        """
        for task in fields(self):
            generation_config = getattr(self, task.name)
            own = (
                ("order", "schedule", "cache")
                if isinstance(generation_config, GenerationConfig)
                else ()
            )
            for name in own:
                if not isinstance(getattr(generation_config, name), str | None):
                    raise ValueError(
                        f"{task.name}.{name} {getattr(generation_config, name)!r} is a class of "
                        "your own, which a checkpoint cannot carry; leave it out here and give it "
                        "where the model is asked"
                    )
        return json.dumps(asdict(self), indent=2) + "\n"

    def in_each_task(self, **values: Any) -> Defaults:
        """With these values of `GenerationConfig` in all tasks; None leaves what is there.

        Of values that exclude each other, what is given takes the place of what is there.
        """
        given = {name: value for name, value in values.items() if value is not None}
        parallel = [name for name in PARALLEL if name in given]
        if len(parallel) == 1:
            given |= {name: None for name in PARALLEL if name not in given}
            if parallel != ["threshold"]:
                given.setdefault("threshold_exclusive", False)
        if "order" in given:
            if given["order"] not in RANKED:  # no order that noise would be on
                given.setdefault("order_temperature", 0.0)
            if given["order"] != "entropy":
                given.setdefault("entropy_bound", None)
        if given.get("schedule", "shifted") != "shifted":
            given.setdefault("shift", GenerationConfig.shift)
        tasks = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {
            name: replace(task, **given)
            for name, task in tasks.items()
            if isinstance(task, GenerationConfig)
        }
        return replace(self, **changed)

    @classmethod
    def from_json(
        cls, path: str | PathLike[str], *, generation: Mapping[str, Any] | None = None
    ) -> Defaults:
        """Read a generation_config.json; without the file, the defaults above.

        generation  what the file would say by itself: the decoding of a published family

        Raises ValueError that names the file for what is no JSON, an unknown key or a bad value.
        """
        path = Path(path)
        usual = cls().updated(generation or {})
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return usual
        except (OSError, ValueError, RecursionError) as error:  # a JSON error is a ValueError
            raise ValueError(
                f"{path} cannot be read ({reason_of(error)}); mend it or remove it"
            ) from error
        try:
            return usual.updated(given)
        except ValueError as error:
            raise ValueError(f"{path}: {reason_of(error)}") from error


def _updated(record: Any, given: object, *, where: str = "") -> Any:
    """A frozen dataclass with the entries of a JSON object; unknown ones are errors."""
    if not isinstance(given, Mapping):
        what = where.rstrip(".") or "the file"
        raise ValueError(f"{what} must hold an object {{...}}, not {given!r}")
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    for name, value in given.items():
        if name not in values:
            raise ValueError(
                f"unknown key {where + name!r}; known are {', '.join(values)}"
                f"{suggestion(str(name), values)}"
            )
        old = values[name]
        values[name] = (
            _updated(old, value, where=f"{where}{name}.")
            if isinstance(old, GenerationConfig)
            else value
        )
    try:
        return type(record)(**values)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
