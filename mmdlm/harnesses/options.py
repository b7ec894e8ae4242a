"""Settle how a request of a harness is answered, by the user, a preset, the task and the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from mmdlm.core.sampling.cache import Cache
from mmdlm.core.sampling.order import Order
from mmdlm.core.sampling.unmasking import UnmaskingRule
from mmdlm.harnesses.published import Preset
from mmdlm.pipeline.checks import check_choice, check_flag, check_number, check_whole_number
from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.pipeline.inputs import part_of
from mmdlm.pipeline.model import Model
from mmdlm.pipeline.sampler_names import CACHES, ORDERS, RULES
from mmdlm.pipeline.task_defaults import Defaults
from mmdlm.vision.known_names import suggestion

EndOfText = Literal["deprioritize", "suppress"]
SAMPLING = tuple(one.name for one in fields(GenerationConfig))
OWN = (
    *("max_new_tokens", "tokens_per_step", "end_of_text", "think", "ignore_until"),
    *("estimator", "samples"),
)
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# What other models have and a masked-diffusion model has not, where it changes nothing.
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "repetition_penalty": (1.0, None),
    "use_cache": (True, False, None),
}


@dataclass(frozen=True)
class Ask:
    """How one text is written.

    Attributes:
        config: How its tokens are filled.
        length: Room for it, in tokens.
        chat: Whether it answers a conversation, or goes on with a text.
        until: The text ends before the first of these.
        think: As in `mmdlm.pipeline.options.ChatOptions`.
        suppress_end: The end of a text has no probability.
    """

    config: GenerationConfig
    length: int
    chat: bool
    until: tuple[str, ...] = ()
    think: bool | None = None
    suppress_end: bool = False


@dataclass(frozen=True)
class HarnessOptions:
    """What a user says of how a model is asked, beside a preset.

    What is said first wins: the user's `given`, the preset for the task, the task's own arguments,
    the model's defaults.

    Attributes:
        given: Names of `GenerationConfig`, and: max_new_tokens; tokens_per_step, in place of
            num_inference_steps; end_of_text, "deprioritize" (positions where the end of a text or
            of a turn is most likely are committed last) or "suppress" (the end of a text is never
            generated); think; ignore_until, not to cut a text at the task's stop strings;
            estimator, a class of `mmdlm.core.likelihood`, and samples, both of log-likelihoods.
        preset: Published settings; None: none.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    preset: Preset | None = None

    def __post_init__(self) -> None:
        """Check names and values that no `GenerationConfig` checks."""
        known = (*OWN, *SAMPLING)
        for name in self.given:
            if name not in known:
                raise ValueError(
                    f"unknown option {name!r}; known are {', '.join(known)}"
                    f"{suggestion(name, known)}"
                )
        for name in ("max_new_tokens", "samples"):
            if self.given.get(name) is not None:
                check_whole_number(name, self.given[name], least=1)
        if self.given.get("tokens_per_step") is not None:
            check_number("tokens_per_step", self.given["tokens_per_step"])
            if self.given["tokens_per_step"] <= 0:
                raise ValueError(
                    f"tokens_per_step must be above 0, got {self.given['tokens_per_step']}"
                )
        if self.given.get("tokens_per_step") and self.given.get("num_inference_steps"):
            raise ValueError("num_inference_steps and tokens_per_step exclude each other; give one")
        if self.given.get("end_of_text") is not None:
            check_choice("end_of_text", self.given["end_of_text"], EndOfText)
        for name in ("think", "ignore_until"):
            if self.given.get(name) is not None:
                check_flag(name, self.given[name])

    def settings_for(self, task: str | None) -> dict[str, Any]:
        """Return what the user and the preset say for a task."""
        published = {} if self.preset is None else self.preset.settings_for(task)
        if "num_inference_steps" in self.given or "tokens_per_step" in self.given:
            for name in ("num_inference_steps", "tokens_per_step"):
                published.pop(name, None)
        elif published.get("num_inference_steps") and "max_new_tokens" in self.given:
            # as many tokens a step as the preset has, whatever the length
            length, steps = published["max_new_tokens"], published.pop("num_inference_steps")
            published["tokens_per_step"] = length / steps
        return {**published, **self.given}

    def ask(
        self,
        model: Model,
        *,
        task: str | None,
        requested: Mapping[str, Any],
        until: tuple[str, ...] = (),
        chat: bool,
    ) -> Ask:
        """Settle how one request is answered.

        Args:
            model: That is asked.
            task: Name of the task in the harness.
            requested: Arguments of the request, see `sampling_of`.
            until: Its stop strings.
            chat: Whether the prompt is a conversation.

        Returns:
            The sampler, the room for the answer, and what else was said of it.

        Raises:
            ValueError: For values out of range, or that exclude each other.
        """
        said = self.settings_for(task)
        options = {**requested, **said}
        length = model.new_tokens(options.get("max_new_tokens"))
        base = model.defaults.answer if chat else model.defaults.complete
        base = updated(base, {k: v for k, v in options.items() if k in SAMPLING})
        steps = options.get("num_inference_steps")
        if options.get("tokens_per_step"):
            steps = math.ceil(length / options["tokens_per_step"])
        if steps is None:
            config = model.writing(base, length)
        else:
            config = replace(base, num_inference_steps=max(steps, _blocks(base, length)))
        end = options.get("end_of_text")
        if end == "deprioritize":
            ends = model.prompt_template.stop_ids(model.codec)
            config = replace(config, deprioritized_ids=(*config.deprioritized_ids, *ends))
        return Ask(
            config,
            length,
            chat,
            until=() if options.get("ignore_until") else until,
            think=options.get("think") if chat else None,
            suppress_end=end == "suppress",
        )


def sampling_of(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Translate the generation arguments of a harness into our names.

    Args:
        arguments: As a task or `--gen_kwargs` has them: until, max_gen_toks (or its other names),
            do_sample, temperature, top_p, top_k, and names of `HarnessOptions`.

    Returns:
        Options by our names, and the stop strings.

    Raises:
        ValueError: For an argument that a masked-diffusion model does not have.
    """
    rest = dict(arguments)
    until = [rest.pop(name) for name in ("until", "stop") if name in rest]
    stops = [one for some in until for one in ([some] if isinstance(some, str) else some or [])]
    lengths = [value for name in LENGTHS if (value := rest.pop(name, None)) is not None]
    samples, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
    found: dict[str, Any] = {}
    if lengths:
        found["max_new_tokens"] = int(lengths[0])
    if samples is False or (temperature is not None and not temperature):
        found["temperature"] = 0.0
        rest.pop("top_p", None), rest.pop("top_k", None)  # of no draw
    elif temperature is not None:
        found["temperature"] = float(temperature)
    for name, neutral in (("top_p", 1), ("top_k", 0)):
        if (value := rest.pop(name, None)) not in (None, neutral):
            found[name] = value
    for name, value in rest.items():
        if name in SAMPLING or name in OWN:
            found[name] = value
        elif value not in WITHOUT_EFFECT.get(name, ()):
            raise ValueError(
                f"the generation argument {name}={value!r} is none of a masked-diffusion model"
                f"{suggestion(name, (*SAMPLING, *OWN))}; leave it out of --gen_kwargs or the task"
            )
    return found, tuple(one for one in stops if one)


def updated(config: GenerationConfig, values: Mapping[str, Any]) -> GenerationConfig:
    """Put other values into a config, of which some may exclude each other.

    Args:
        config: Of the model.
        values: Names of `GenerationConfig`; None takes back what the config has; the class path of
            an order, a schedule or a cache of one's own stands for one.

    Returns:
        A new config.
    """
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, kind, known in (
        ("order", Order, ORDERS),
        ("schedule", UnmaskingRule, RULES),
        ("cache", Cache, CACHES),
    ):
        if isinstance(values.get(name), str):
            values[name] = part_of(values[name], kind, names=tuple(known))
    absent: dict[str, Any] = {k: v for k, v in values.items() if v is None or v is False}
    config = replace(config, **absent)
    each: dict[str, Any] = {
        one.name: config for one in fields(Defaults) if one.type == GenerationConfig.__name__
    }
    return Defaults(**each).in_each_task(**values).answer


def _blocks(config: GenerationConfig, length: int) -> int:
    return math.ceil(length / (config.block_length or length))
