"""How a policy answers while it learns: in words or in an image, laid out as at inference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data_pipelines.sources.problems import Problem
from mmdlm.core.sequence import Sequence as Document
from mmdlm.core.sequence import text_segment
from mmdlm.pipeline.generation_config import GenerationConfig
from mmdlm.pipeline.generation_run import GenerationRun
from mmdlm.pipeline.inputs import generation_config_with, pillow_image, with_places
from mmdlm.pipeline.model import Model
from mmdlm.rl.rollout import Rollout
from mmdlm.templates.conversation import turns_of
from mmdlm.templates.task_prompt import Codes, TaskPrompt


class Answering(ABC):
    """The task that is learned: from problems to documents with targets, and to completions."""

    @abstractmethod
    def task_prompt(self, model: Model, problem: Problem) -> TaskPrompt:
        """Return the prompt of a problem; ValueError for one that the model cannot be asked."""

    @abstractmethod
    def generation_run(
        self,
        model: Model,
        problems: Sequence[Problem],
        task_prompts: list[TaskPrompt],
        *,
        generator: torch.Generator,
    ) -> GenerationRun:
        """Return the run of the sampler that fills the targets, one row for each prompt."""

    @abstractmethod
    def completions(
        self,
        model: Model,
        problems: Sequence[Problem],
        generation_run: GenerationRun,
        rollout: Rollout,
    ) -> list[Any]:
        """Return what rewards are given: a text or an image for each row."""

    def scored(
        self,
        model: Model,
        problems: Sequence[Problem],
        generation_run: GenerationRun,
        rollout: Rollout,
    ) -> Tensor:
        """[B, L] bool, the targets that rewards have seen: a loss is only about those."""
        return rollout.scored

    @abstractmethod
    def generation_config(self, model: Model, problem: Problem) -> GenerationConfig:
        """How the targets of such a problem are filled."""


@dataclass(frozen=True)
class Write(Answering):
    """An answer in words; what is not given is the model's own, as in `Model.chat`.

    Attributes:
        max_new_tokens: Room for an answer: the budget of its length.
        early_stop: A row whose text has ended takes no more part in forward passes.
        sampler: All of the sampler's settings, in place of the four before.
    """

    max_new_tokens: int = 128
    num_inference_steps: int | None = None
    block_length: int | None = None
    temperature: float | None = 1.0
    guidance_scale: float | None = None
    think: bool | None = None
    early_stop: bool = True
    sampler: GenerationConfig | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")

    def task_prompt(self, model: Model, problem: Problem) -> TaskPrompt:
        prompt, length = problem.prompt, self.max_new_tokens
        model.prompt_template.require("answer" if prompt.chat else "complete", model.text_tokenizer)
        if not prompt.chat:
            task_prompt = model.prompt_template.completion_prompt(
                model.codec, prompt.text, length=length
            )
            return model.fitting(task_prompt, length)
        paths = problem.columns.get("images") or []
        images = model.look([[pillow_image(one) for one in paths]], "answer")[0]
        message = {"role": "user", "content": with_places(prompt.text, len(images))}
        turns = model.prompt_template.thinking(turns_of([message], images), self.think)
        task_prompt = model.prompt_template.chat_prompt(model.codec, turns, length=length)
        if prompt.begun:
            (first,) = task_prompt.output_segments
            begun = text_segment(model.codec.encode(prompt.begun))
            segments = task_prompt.sequence.segments
            document = Document((*segments[:first], begun, *segments[first:]))
            task_prompt = TaskPrompt(document, task_prompt.unconditional, (first + 1,))
        return model.fitting(task_prompt, length)

    def generation_config(self, model: Model, problem: Problem) -> GenerationConfig:
        if self.sampler is not None:
            return self.sampler
        usual = model.defaults.answer if problem.prompt.chat else model.defaults.complete
        return model.writing(
            # What is drawn is scored by the model's own probabilities, an end at once included.
            replace(usual, min_new_tokens=0),
            self.max_new_tokens,
            num_inference_steps=self.num_inference_steps,
            block_length=self.block_length,
            temperature=self.temperature,
            guidance_scale=self.guidance_scale,
        )

    def generation_run(
        self,
        model: Model,
        problems: Sequence[Problem],
        task_prompts: list[TaskPrompt],
        *,
        generator: torch.Generator,
    ) -> GenerationRun:
        generation_run = model.generation_run(
            task_prompts,
            generation_config=self.generation_config(model, problems[0]),
            generator=generator,
            suppress_tokens=model.prompt_template.suppress_tokens(model.codec)
            if problems[0].prompt.chat
            else (),
        )
        if not self.early_stop:
            return generation_run
        ends = model.prompt_template.stop_ids(model.codec)
        return replace(generation_run, sampler=replace(generation_run.sampler, stop_ids=ends))

    def completions(
        self,
        model: Model,
        problems: Sequence[Problem],
        generation_run: GenerationRun,
        rollout: Rollout,
    ) -> list[Any]:
        answers = generation_run.results(rollout.batch.ids)
        texts = [model.prompt_template.decode(model.codec, ids.cpu()) for ids in answers]
        return [one.prompt.whole(text) for one, text in zip(problems, texts, strict=True)]

    def scored(
        self,
        model: Model,
        problems: Sequence[Problem],
        generation_run: GenerationRun,
        rollout: Rollout,
    ) -> Tensor:
        """Without what stands behind an end that is spelled in letters.

        A prompt may name texts that end an answer (`Prompt.stop`), and a layout may know some.
        """
        scored = rollout.scored.clone()
        places = generation_run.results(
            torch.arange(scored.shape[1]).expand_as(scored).to(scored.device)
        )
        for row, (problem, where) in enumerate(zip(problems, places, strict=True)):
            where = where[scored[row, where]]  # [T]
            ids = rollout.batch.ids[row, where].cpu()
            scored[row, where[_seen(model, problem, ids) :]] = False
        return scored


def _seen(model: Model, problem: Problem, ids: Tensor) -> int:
    """How many of the ids [T] of an answer the text that is rewarded is made of, its end included.

    Ids are left out from the end as long as the text stays what it is, but for one of them, which
    ends it.
    """

    def text(count: int) -> str:
        return problem.prompt.whole(model.prompt_template.decode(model.codec, ids[:count]))

    whole, seen = text(len(ids)), len(ids)
    if seen < 2 or text(seen - 2) != whole:  # the usual case: nothing stands behind the end
        return seen
    while seen and text(seen - 1) == whole:
        seen -= 1
    return seen


@dataclass(frozen=True)
class Draw(Answering):
    """An image of the model's own size; what is not given is as in `Model.text_to_image`.

    Rewards are of the image under guidance; what is learned is the conditional branch.

    Attributes:
        sampler: All of the sampler's settings, in place of those before.
    """

    num_inference_steps: int | None = None
    temperature: float | None = None
    guidance_scale: float | None = None
    sampler: GenerationConfig | None = None

    def task_prompt(self, model: Model, problem: Problem) -> TaskPrompt:
        model.prompt_template.require("text_to_image", model.text_tokenizer)
        if not problem.prompt.text.strip():
            raise ValueError(f"prompt {problem.prompt.text!r} is empty; say in words what to draw")
        codes = Codes.blank(model.codec, self._grid(model), drawn=True)
        return model.fitting(
            model.prompt_template.image_prompt(model.codec, problem.prompt.text, image=codes)
        )

    def generation_config(self, model: Model, problem: Problem) -> GenerationConfig:
        return self.sampler or generation_config_with(
            model.defaults.text_to_image,
            num_inference_steps=self.num_inference_steps,
            temperature=self.temperature,
            guidance_scale=self.guidance_scale,
        )

    def generation_run(
        self,
        model: Model,
        problems: Sequence[Problem],
        task_prompts: list[TaskPrompt],
        *,
        generator: torch.Generator,
    ) -> GenerationRun:
        return model.generation_run(
            task_prompts,
            generation_config=self.generation_config(model, problems[0]),
            generator=generator,
            grid=self._grid(model),
        )

    def completions(
        self,
        model: Model,
        problems: Sequence[Problem],
        generation_run: GenerationRun,
        rollout: Rollout,
    ) -> list[Any]:
        return model.decode(model.codes(generation_run, rollout.batch.ids), generation_run.grid)

    def _grid(self, model: Model) -> tuple[int, int]:
        tokenizer = model.need_images()
        height, width = model.prompt_template.drawn_size(
            (None, None), edge=tokenizer.image_size, cell=tokenizer.downsampling
        )
        return height // tokenizer.downsampling, width // tokenizer.downsampling
