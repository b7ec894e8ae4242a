"""How a policy answers while it learns: in words or in a picture, laid out as at inference."""

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
from mmdlm.pipeline.generation_config import Decoding
from mmdlm.pipeline.generation_run import Filling
from mmdlm.pipeline.inputs import decoding_with, open_picture, with_places
from mmdlm.pipeline.model import Model
from mmdlm.rl.rollout import Rollout
from mmdlm.templates.conversation import turns_of
from mmdlm.templates.prompt_template import Ask, Codes


class Answering(ABC):
    """The task that is learnt: from problems to documents with targets, and back to completions."""

    @abstractmethod
    def ask(self, model: Model, problem: Problem) -> Ask:
        """A problem, laid out. Raises ValueError for one that the model cannot be asked."""

    @abstractmethod
    def filling(
        self,
        model: Model,
        problems: Sequence[Problem],
        asks: list[Ask],
        *,
        generator: torch.Generator,
    ) -> Filling:
        """What fills the targets, one row an ask."""

    @abstractmethod
    def completions(
        self, model: Model, problems: Sequence[Problem], filling: Filling, rollout: Rollout
    ) -> list[Any]:
        """What rewards are given: a text or a picture for each row, whose problems are given."""

    def scored(
        self, model: Model, problems: Sequence[Problem], filling: Filling, rollout: Rollout
    ) -> Tensor:
        """[B, L] bool, the targets that rewards have seen: a loss is about those alone."""
        return rollout.scored

    @abstractmethod
    def decoding(self, model: Model, problem: Problem) -> Decoding:
        """How the targets of such a problem are filled."""


@dataclass(frozen=True)
class Write(Answering):
    """An answer in words; what is not given is the model's own, as in `Model.chat`.

    max_new_tokens  room for an answer: the budget of its length
    early_stop      a row whose text has ended takes no more part in forward passes
    sampler         all of the sampler's settings, in place of the four before
    """

    max_new_tokens: int = 128
    num_inference_steps: int | None = None
    block_length: int | None = None
    temperature: float | None = 1.0
    guidance_scale: float | None = None
    think: bool | None = None
    early_stop: bool = True
    sampler: Decoding | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")

    def ask(self, model: Model, problem: Problem) -> Ask:
        prompt, length = problem.prompt, self.max_new_tokens
        model.layout.need("answer" if prompt.chat else "complete", model.text_tokenizer)
        if not prompt.chat:
            ask = model.layout.complete(model.words, prompt.text, length=length)
            return model.fitting(ask, length)
        paths = problem.columns.get("images") or []
        pictures = model.look([[open_picture(one) for one in paths]], "answer")[0]
        message = {"role": "user", "content": with_places(prompt.text, len(pictures))}
        turns = model.layout.thinking(turns_of([message], pictures), self.think)
        ask = model.layout.reply(model.words, turns, length=length)
        if prompt.begun:
            (first,) = ask.shown
            begun = text_segment(model.words.spoken(prompt.begun))
            segments = ask.sequence.segments
            document = Document((*segments[:first], begun, *segments[first:]))
            ask = Ask(document, ask.opposite, (first + 1,))
        return model.fitting(ask, length)

    def decoding(self, model: Model, problem: Problem) -> Decoding:
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

    def filling(
        self,
        model: Model,
        problems: Sequence[Problem],
        asks: list[Ask],
        *,
        generator: torch.Generator,
    ) -> Filling:
        filling = model.filling(
            asks,
            decoding=self.decoding(model, problems[0]),
            generator=generator,
            suppressed=model.layout.suppressed(model.words) if problems[0].prompt.chat else (),
        )
        if not self.early_stop:
            return filling
        ends = model.layout.ends(model.words)
        return replace(filling, sampler=replace(filling.sampler, stop_ids=ends))

    def completions(
        self, model: Model, problems: Sequence[Problem], filling: Filling, rollout: Rollout
    ) -> list[Any]:
        answers = filling.results(rollout.batch.ids)
        texts = [model.layout.decode(model.words, ids.cpu()) for ids in answers]
        return [one.prompt.whole(text) for one, text in zip(problems, texts, strict=True)]

    def scored(
        self, model: Model, problems: Sequence[Problem], filling: Filling, rollout: Rollout
    ) -> Tensor:
        """Without what stands behind an end that is spelt in letters.

        A prompt may name texts that end an answer (`Prompt.stop`), and a layout may know some.
        """
        scored = rollout.scored.clone()
        places = filling.results(torch.arange(scored.shape[1]).expand_as(scored).to(scored.device))
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
        return problem.prompt.whole(model.layout.decode(model.words, ids[:count]))

    whole, seen = text(len(ids)), len(ids)
    if seen < 2 or text(seen - 2) != whole:  # the usual case: nothing stands behind the end
        return seen
    while seen and text(seen - 1) == whole:
        seen -= 1
    return seen


@dataclass(frozen=True)
class Draw(Answering):
    """A picture of the model's own size; what is not given is as in `Model.text_to_image`.

    Rewards are of the picture under guidance; what is learnt is the conditional branch.

    sampler  all of the sampler's settings, in place of those before
    """

    num_inference_steps: int | None = None
    temperature: float | None = None
    guidance_scale: float | None = None
    sampler: Decoding | None = None

    def ask(self, model: Model, problem: Problem) -> Ask:
        model.layout.need("text_to_image", model.text_tokenizer)
        if not problem.prompt.text.strip():
            raise ValueError(f"prompt {problem.prompt.text!r} is empty; say in words what to draw")
        codes = Codes.blank(model.words, self._grid(model), drawn=True)
        return model.fitting(model.layout.draw(model.words, problem.prompt.text, picture=codes))

    def decoding(self, model: Model, problem: Problem) -> Decoding:
        return self.sampler or decoding_with(
            model.defaults.text_to_image,
            num_inference_steps=self.num_inference_steps,
            temperature=self.temperature,
            guidance_scale=self.guidance_scale,
        )

    def filling(
        self,
        model: Model,
        problems: Sequence[Problem],
        asks: list[Ask],
        *,
        generator: torch.Generator,
    ) -> Filling:
        return model.filling(
            asks,
            decoding=self.decoding(model, problems[0]),
            generator=generator,
            grid=self._grid(model),
        )

    def completions(
        self, model: Model, problems: Sequence[Problem], filling: Filling, rollout: Rollout
    ) -> list[Any]:
        return model.decode(model.codes(filling, rollout.batch.ids), filling.grid)

    def _grid(self, model: Model) -> tuple[int, int]:
        tokenizer = model.need_pictures()
        height, width = model.layout.drawn_size(
            (None, None), edge=tokenizer.image_size, cell=tokenizer.downsampling
        )
        return height // tokenizer.downsampling, width // tokenizer.downsampling
