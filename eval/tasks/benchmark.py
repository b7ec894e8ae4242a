"""Ask a model a list of problems, score what it says, and write down how it was asked.

The scoring needs no model: only a function from prompts to completions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipelines.sources.problems import Problem, Prompt, columns_of
from eval.metrics import estimate, wilson_interval
from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.pipeline.model import Model
from mmdlm.pipeline.sampler_names import CacheName
from mmdlm.rl.reward import Breakdown, Rubric
from mmdlm.templates.conversation import turns_of
from mmdlm.templates.segments import continued
from mmdlm.templates.task_prompt import TaskPrompt

Completer = Callable[[Sequence[Prompt]], Sequence[str]]


@dataclass(frozen=True)
class Benchmark:
    """Problems, and what is measured of the answers.

    Attributes:
        rubric: measure -> reward; each is reported by itself, weights do not matter.
        measures: measure -> what it says.
        facts: Of the problems, for the report.
        groups: Column by whose values the measures are reported as well; "" for none.
    """

    name: str
    problems: tuple[Problem, ...]
    rubric: Rubric
    measures: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    groups: str = ""


@dataclass(frozen=True)
class Faster:
    """Arguments of `Model.with_generation`; all None: the usual way."""

    cache: CacheName | None = None
    cache_refresh: int | None = None
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    in_order: bool | None = None
    distinct: bool | None = None

    @property
    def name(self) -> str:
        """For the table."""
        given = [
            name.replace("_", " ") + ("" if value is True else f" {value}")
            for name, value in self._given().items()
            if value is not None
        ]
        return ", ".join(given) or "usual"

    def applied_to(self, model: Model) -> Model:
        """Return the model with this decoding."""
        return model.with_generation(**self._given())

    def _given(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(Faster)}


@dataclass(frozen=True)
class Asked(Faster):
    """How the model is asked; what is not given is the model's own.

    Args:
        max_new_tokens: Room for an answer.
        num_inference_steps: Denoising steps of an answer; default: the model's tokens per step.
        block_length: Finish so many tokens before the next.
        temperature: Of the draw of tokens; 0 takes the likeliest.
        guidance_scale: Classifier-free guidance; 1 is off.
        think: Give reasons first, or not, where the model was trained for either.
        cache: What a step remembers of the steps before: prompt, prefix, dual, delayed or stable.
        cache_refresh: Compute all again every so many steps.
        threshold: Commit every token of at least this probability.
        factor: The same, but the more tokens at once the surer each has to be.
        entropy_bound: The same, by entropies, in nats.
        in_order: Of the tokens so found sure, those that stand in the order before all others.
        distinct: Of several sure tokens of one word only the first.
        limit: Problems to ask, chosen at random by the seed; default: all.
        seed: Of everything that is drawn at random.
        batch_size: Problems in one call of the model.
        device: "cpu", "cuda" and so on; default: a GPU where there is one.
    """

    max_new_tokens: int | None = None
    num_inference_steps: int | None = None
    block_length: int | None = None
    temperature: float | None = None
    guidance_scale: float | None = None
    think: bool | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int = 16
    device: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} {value} is too small; give {least} or more")

    def of(self, problems: Sequence[Problem]) -> tuple[Problem, ...]:
        """As many as are to be asked, in their order."""
        if self.limit is None or self.limit >= len(problems):
            return tuple(problems)
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(problems), generator=generator)[: self.limit]
        return tuple(problems[int(i)] for i in chosen.sort().values)


# ---- asking --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking:
    """A model as a function from prompts to completions, which draws from one generator."""

    model: Model
    asked: Asked
    generator: torch.Generator

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the model's completion of each prompt, unchanged."""
        found: dict[int, str] = {}
        for kind in (self._continued, self._answered, self._gone_on):
            chosen = [n for n, one in enumerate(prompts) if self._kind(one) == kind]
            if chosen:
                found |= zip(chosen, kind([prompts[n] for n in chosen]), strict=True)
        return [found[n] for n in range(len(prompts))]

    def _kind(self, prompt: Prompt) -> Callable[[list[Prompt]], list[str]]:
        if not prompt.chat:
            return self._continued
        return self._gone_on if prompt.begun else self._answered

    def _continued(self, prompts: list[Prompt]) -> list[str]:
        return self.model.complete(
            [one.text for one in prompts], generator=self.generator, **self._options()
        )

    def _answered(self, prompts: list[Prompt]) -> list[str]:
        return self.model.answer(
            [one.text for one in prompts],
            generator=self.generator,
            think=self.asked.think,
            **self._options(),
        )

    @torch.no_grad()
    def _gone_on(self, prompts: list[Prompt]) -> list[str]:
        self.model.prompt_template.require("chat", self.model.text_tokenizer)
        suppress_tokens = self.model.prompt_template.suppress_tokens(self.model.codec)
        return self.model.text_run(
            [self._laid_out(one) for one in prompts],
            self.generation_config(chat=True),
            self.generator,
            suppress_tokens=suppress_tokens,
        ).texts()

    def check(self, problems: Sequence[Problem]) -> None:
        """Raise ValueError that names the first problem that the model cannot be asked."""
        for task in sorted({self._task(one.prompt) for one in problems}):
            self.model.prompt_template.require(task, self.model.text_tokenizer)
        for one in problems:
            try:
                self._laid_out(one.prompt)
            except ValueError as error:
                raise ValueError(f"{one.name}: {error}") from error

    def _task(self, prompt: Prompt) -> str:
        if not prompt.chat:
            return "complete"
        return "chat" if prompt.begun else "answer"

    def _laid_out(self, prompt: Prompt) -> TaskPrompt:
        """Return a prompt with room for the answer, with its given beginning before the rest."""
        model, length = self.model, self.length
        if not prompt.chat:
            return model.fitting(
                model.prompt_template.completion_prompt(model.codec, prompt.text, length=length),
                length,
            )
        turns = model.prompt_template.thinking(turns_of(prompt.messages, []), self.asked.think)
        ask = model.prompt_template.chat_prompt(model.codec, turns, length=length)
        if prompt.begun:
            ask = continued(ask, model.codec.encode(prompt.begun))
        return model.fitting(ask, length)

    @property
    def length(self) -> int:
        """Tokens of an answer."""
        given = self.asked.max_new_tokens
        return self.model.defaults.max_new_tokens if given is None else given

    def generation_config(self, *, chat: bool) -> GenerationConfig:
        """Return the sampler's settings, as the model derives them from what was asked for."""
        usual = self.model.defaults.answer if chat else self.model.defaults.complete
        return self.model.writing(usual, self.length, **self._steps())

    def _steps(self) -> dict[str, Any]:
        names = ("num_inference_steps", "block_length", "temperature", "guidance_scale")
        return {name: getattr(self.asked, name) for name in names}

    def _options(self) -> dict[str, Any]:
        return {"max_new_tokens": self.asked.max_new_tokens, **self._steps()}


# ---- scoring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """N problems, what was said, and what each answer is worth."""

    problems: tuple[Problem, ...]
    completions: tuple[str, ...]
    breakdown: Breakdown


def ask(
    problems: Sequence[Problem], complete: Completer, *, batch_size: int = 16, title: str = ""
) -> tuple[str, ...]:
    """Return the completions of all prompts, computed a batch at a time.

    Args:
        problems: To ask.
        complete: Completes some prompts.
        batch_size: Prompts at a time.
        title: Of a progress bar; "": none is drawn.

    Returns:
        A completion of each problem, in order.

    Raises:
        ValueError: For the wrong number of completions.
    """
    completions: list[str] = []
    with tqdm(total=len(problems), desc=title, unit=" problems", disable=not title) as bar:
        for start in range(0, len(problems), batch_size):
            prompts = [one.prompt for one in problems[start : start + batch_size]]
            said = complete(prompts)
            if len(said) != len(prompts):
                raise ValueError(f"{len(said)} completions of {len(prompts)} prompts")
            completions += said
            bar.update(len(prompts))
    return tuple(completions)


def rate(benchmark: Benchmark, completions: Sequence[str]) -> Scored:
    """Score the whole texts; ValueError for a reward that fails, or no problems at all."""
    problems = benchmark.problems
    if not problems:
        raise ValueError(f"{benchmark.name}: there are no problems to ask")
    pairs = zip(problems, completions, strict=True)
    breakdown = benchmark.rubric(
        [one.prompt.messages for one in problems],
        [one.prompt.whole(said) for one, said in pairs],
        columns=columns_of(problems),
    )
    return Scored(problems, tuple(completions), breakdown)


def summarize(benchmark: Benchmark, scored: Scored) -> dict[str, Any]:
    """Each measure over all problems, and over those of each group."""
    found: dict[str, Any] = {"count": len(scored.problems), "measures": _summary(scored, None)}
    if benchmark.groups:
        values = [str(one.columns[benchmark.groups]) for one in scored.problems]
        found[f"by_{benchmark.groups}"] = {
            value: _summary(scored, torch.tensor([one == value for one in values]))
            for value in sorted(set(values))
        }
    return found


def _summary(scored: Scored, rows: Tensor | None) -> dict[str, Any]:
    """Mean, standard error and count of each; of hits and misses the 95 % interval as well."""
    found = {}
    for name, values in scored.breakdown.rewards.items():
        given = values if rows is None else values[rows]
        given = given[~given.isnan()]
        if not len(given):
            continue
        one: dict[str, Any] = asdict(estimate(given))
        if bool(((given == 0) | (given == 1)).all()):
            one["interval_95"] = wilson_interval(given == 1)
        if math.isnan(one["standard_error"]):  # one problem alone: JSON knows no NaN
            one["standard_error"] = None
        found[name] = one
    return found
