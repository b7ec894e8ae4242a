"""Ask a model the questions of a harness, in batches: each answer is that of the question alone."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmdlm.harnesses.options import Ask, HarnessOptions, sampling_of, updated
from mmdlm.harnesses.published import preset_named
from mmdlm.models.quantization import KINDS
from mmdlm.pipeline.inputs import ImageLike, pillow_image
from mmdlm.pipeline.model import Model
from mmdlm.templates.segments import continued
from mmdlm.templates.task_prompt import ImageInput, TaskPrompt, Turn
from mmdlm.vision.known_names import suggestion

AUTO = 64  # rows of a batch, to begin with
LOADING = (
    *("dtype", "quantization", "adapter", "merge_adapter", "image_tokenizer"),
    *("revision", "token", "cache_dir", "local_files_only"),
)
Said = tuple[str, tuple[str | ImageLike, ...]]  # role, text and images in reading order

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """One request of a harness for a text.

    Attributes:
        text: Of which the model writes what follows; None: there are `turns`.
        turns: A conversation, whose next turn the model writes.
        begun: What the model's turn begins with.
        arguments: Of generation, as the harness has them.
        task: Name of the task.
        key: What tells the question from others, for its random numbers.
    """

    text: str | None = None
    turns: tuple[Said, ...] = ()
    begun: str = ""
    arguments: Mapping[str, Any] | None = None
    task: str | None = None
    key: str = ""

    @property
    def images(self) -> list[ImageLike]:
        """Return the images in reading order."""
        return [part for _, parts in self.turns for part in parts if not isinstance(part, str)]


@dataclass(frozen=True)
class Subject:
    """A model that harnesses ask.

    Attributes:
        model: The model.
        options: How it is asked.
        batch_size: Rows at once; halved where memory runs out.
        seed: Of the random numbers of each question, together with the question.
    """

    model: Model
    options: HarnessOptions = HarnessOptions()
    batch_size: int = 1
    seed: int = 0

    @classmethod
    def open(
        cls,
        pretrained: str | Model,
        *,
        preset: str | None = None,
        batch_size: int | str = 1,
        most: int | None = None,
        device: str | None = None,
        seed: int = 0,
        given: Mapping[str, Any],
    ) -> Subject:
        """Load a model by the arguments of a harness.

        Args:
            pretrained: Bundled name, folder, or OWNER/NAME of the Hub; or a model.
            preset: Name of published settings.
            batch_size: Rows at once, or "auto".
            most: Most rows at once.
            device: "cpu", "cuda", ...; None: a GPU if there is one.
            seed: Of all random numbers.
            given: Arguments of `mmdlm.load`, and options of `HarnessOptions`.

        Returns:
            The model and how it is asked.

        Raises:
            ValueError: For an unknown name or a bad value, before the model is loaded.
        """
        loading = {name: value for name, value in given.items() if name in LOADING}
        try:
            options = HarnessOptions(
                {name: value for name, value in given.items() if name not in LOADING},
                None if preset is None else preset_named(preset),
            )
        except ValueError as error:
            name = next((one for one in given if repr(one) in str(error)), "")
            raise ValueError(
                f"{error}{suggestion(name, LOADING) if 'unknown' in str(error) else ''}"
            ) from error
        size = _batch_size(batch_size)
        if most is not None:
            size = min(size, _batch_size(most))
        if (dtype := loading.get("dtype")) is not None:
            loading["dtype"] = _dtype(dtype)
        if loading.get("quantization") not in (None, *KINDS):
            raise ValueError(
                f"quantization {loading['quantization']!r} is not one of {', '.join(KINDS)}"
            )
        if isinstance(pretrained, Model):
            if loading:
                raise ValueError(
                    f"{', '.join(loading)} say how to load a model, but one is given; leave them "
                    "out"
                )
            return cls(pretrained, options, size, seed)
        return cls(Model.from_pretrained(pretrained, device=device, **loading), options, size, seed)

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
        """Ask questions in batches, long prompts first.

        Args:
            questions: Of any lengths and settings.

        Yields:
            The number of a question and its answer.

        Raises:
            ValueError: For a question that the model cannot be asked.
        """
        seen: dict[str, int] = {}
        seeds = [
            self.seed_of(one.key or repr((one.text, one.turns, one.begun)), seen)
            for one in questions
        ]
        for ask, numbers in self._alike(questions).items():
            length = {n: _length(questions[n]) for n in numbers}
            rest, size = sorted(numbers, key=lambda n: (-length[n], n)), self.batch_size
            while rest:
                some = rest[:size]
                try:
                    texts = self._written(
                        [questions[n] for n in some], ask, [seeds[n] for n in some]
                    )
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    size = max(1, size // 2)
                    log.warning("memory ran out; going on with a batch of %d", size)
                    torch.cuda.empty_cache()
                    continue
                rest = rest[size:]
                yield from zip(some, texts, strict=True)

    def _alike(self, questions: Sequence[Question]) -> dict[Ask, list[int]]:
        """Return the numbers of the questions that are asked in the same way."""
        groups: dict[Ask, list[int]] = {}
        known: dict[str, Ask] = {}
        for number, question in enumerate(questions):
            same = repr((question.arguments, question.task, question.text is None))
            if same not in known:
                known[same] = self.ask(question)
                self._warn(question)
            groups.setdefault(known[same], []).append(number)
        return groups

    def ask(self, question: Question) -> Ask:
        """Return how a question is asked."""
        requested, until = sampling_of(question.arguments or {})
        return self.options.ask(
            self.model,
            task=question.task,
            requested=requested,
            until=until,
            chat=question.text is None,
        )

    def _warn(self, question: Question) -> None:
        """Say where the user and a preset win over a task, and what else they do not agree on."""
        requested, _ = sampling_of(question.arguments or {})
        said, preset = self.options.settings_for(question.task), self.options.preset
        lost = [
            f"{name} is {said[name]!r}, not {value!r}"
            for name, value in requested.items()
            if said.get(name, value) != value
        ]
        if lost:
            log.warning("task %s: by model_args or preset, %s", question.task, "; ".join(lost))
        if preset is not None and preset.chat and question.text is not None:
            log.warning(
                "task %s: preset %s was published in the chat template; add --apply_chat_template",
                question.task,
                preset.name,
            )

    @torch.no_grad()
    def _written(self, questions: list[Question], ask: Ask, seeds: list[int]) -> list[str]:
        model, codec, template = self.model, self.model.codec, self.model.prompt_template
        images = model.look([[pillow_image(one) for one in q.images] for q in questions], "answer")
        prompts = [
            self._prompt(question, ask, some)
            for question, some in zip(questions, images, strict=True)
        ]
        never = (model.denoiser.vocabulary.eos_id,) if ask.suppress_end else ()

        def completed(number: int, ids: Tensor) -> str:
            return template.completion(codec, questions[number].text or "", ids)

        return model.text_run(
            prompts,
            ask.config,
            [torch.Generator().manual_seed(seed) for seed in seeds],
            decode=None if ask.chat else completed,
            stop=ask.until,
            suppress_tokens=(*never, *template.suppress_tokens(codec)) if ask.chat else never,
        ).texts()

    def _prompt(self, question: Question, ask: Ask, images: list[ImageInput]) -> TaskPrompt:
        model, template = self.model, self.model.prompt_template
        if question.text is not None:
            template.require("complete", model.text_tokenizer)
            text = self.shortened(question.text, ask.length)
            prompt = template.completion_prompt(model.codec, text, length=ask.length)
            return model.fitting(prompt, ask.length)
        template.require("chat" if len(question.turns) > 1 else "answer", model.text_tokenizer)
        rest = iter(images)
        turns = tuple(
            Turn(role, tuple(p if isinstance(p, str) else next(rest) for p in _trimmed(parts)))
            for role, parts in question.turns
        )
        turns = template.thinking(turns, ask.think)
        prompt = template.chat_prompt(model.codec, turns, length=ask.length)
        if question.begun:
            prompt = continued(prompt, model.codec.encode(question.begun))
        return model.fitting(prompt, ask.length)

    def with_drawing(self, values: Mapping[str, Any]) -> Model:
        """Return the model with other values of `GenerationConfig` where it draws and edits."""
        defaults = self.model.defaults
        tasks: dict[str, Any] = {
            name: updated(getattr(defaults, name), values) for name in ("text_to_image", "edit")
        }
        return replace(self.model, defaults=replace(defaults, **tasks))

    def shortened(self, text: str, length: int) -> str:
        """Return the end of a text that leaves room for so many tokens, as lm-eval does."""
        model, rest = self.model, text
        most = max(model.max_length, model.prompt_template.longest)
        while rest:
            over = len(model.codec.encode(rest)) - model.longest_text
            if over <= 0:
                prompt = model.prompt_template.completion_prompt(model.codec, rest, length=length)
                over = len(prompt.sequence) - most
            if over <= 0:
                break
            rest = without_beginning(model, rest, over)
        if rest != text:
            log.warning(
                "a text of %d tokens was cut to its last %d: the model takes %d, %d of them new",
                len(model.codec.encode(text)),
                len(model.codec.encode(rest)),
                most,
                length,
            )
        return rest

    def seed_of(self, name: str, seen: dict[str, int]) -> int:
        """Make the seed of a request of what it says, and of how often it was asked before.

        Args:
            name: What it says.
            seen: How often each was asked again; this one is counted.

        Returns:
            A number of 56 bits.
        """
        seen[name] = seen.get(name, -1) + 1
        digest = hashlib.sha256(f"{self.seed}/{seen[name]}/{name}".encode()).digest()
        return int.from_bytes(digest[:7], "big")


def without_beginning(model: Model, text: str, tokens: int) -> str:
    """Return a text without so many tokens at its beginning."""
    offsets = model.text_tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
    )["offset_mapping"]
    return text[offsets[tokens][0] :] if tokens < len(offsets) else ""


def _trimmed(parts: Sequence[str | ImageLike]) -> list[str | ImageLike]:
    """Return what is said without blanks around it, as `Model.chat` takes a message."""
    trimmed = list(parts)
    if trimmed and isinstance(trimmed[0], str):
        trimmed[0] = trimmed[0].lstrip()
    if trimmed and isinstance(trimmed[-1], str):
        trimmed[-1] = trimmed[-1].rstrip()
    return [part for part in trimmed if not isinstance(part, str) or part]


def _length(question: Question) -> int:
    texts = (p for _, parts in question.turns for p in parts if isinstance(p, str))
    return len(question.text or "") + sum(map(len, texts)) + 1000 * len(question.images)


def _batch_size(given: int | str) -> int:
    """Return the rows of a batch; "auto" begins with many."""
    if str(given).partition(":")[0] == "auto":
        return AUTO
    try:
        size = int(given)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"batch_size must be a number of at least 1, or auto, got {given!r}")
    return size


def _dtype(name: object) -> torch.dtype | None:
    """Return the dtype of a name; None for "auto", that of the weights."""
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        return None
    known = ("float32", "bfloat16", "float16", "auto")
    if name not in known:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(known)}")
    found: torch.dtype = getattr(torch, str(name))
    return found
