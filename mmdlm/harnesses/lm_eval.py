"""Let lm-eval ask a model: likelihoods by any estimator, texts by any sampler, in batches.

`python -m eval.lm_eval` registers the model as "mmdlm" and passes lm-eval's own options through.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

import mmdlm.core.likelihood as likelihoods
from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.harnesses.processes import device_of_process, joined
from mmdlm.harnesses.subject import Question, Subject
from mmdlm.pipeline.inputs import part_of
from mmdlm.pipeline.likelihood import Context, LogLikelihood
from mmdlm.pipeline.model import Model
from mmdlm.vision.known_names import nearest

CONVERSATION = "\x1e"  # begins messages in JSON, as RFC 7464 has it; no text of a task does
AT_ONCE = 64  # batches of texts that are scored in one call, after which they are cached
SURE = 2  # standard errors by which an answer has to lead
SAMPLES = 128  # noisy copies of a text, as LLaDA was evaluated: arXiv:2502.09992, appendix B.6

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Score:
    """The score of one request, for the errors of a task."""

    document: int | None
    value: float
    standard_error: float
    tokens: int


_Scores = dict[tuple[int | None, int], _Score]  # of a document's continuations


@register_model("mmdlm")
class MmdlmLM(LM):
    """A masked-diffusion model for lm-eval.

    Texts have the tokens, and scores the values, that each request has on its own, whatever the
    batch.

    Args:
        pretrained: Bundled name, folder, or OWNER/NAME of the Hugging Face Hub; in Python also a
            model.
        preset: Published settings, see `mmdlm.harnesses.published`.
        batch_size: Rows of a forward pass, or "auto".
        max_batch_size: Most rows where batch_size is "auto".
        device: Default: a CUDA GPU if there is one, else the CPU.
        seed: Of all random numbers, together with each request.
        trust_remote_code: Of data sets; the model runs none.
        **options: Arguments of `mmdlm.load` (dtype, quantization, adapter, merge_adapter,
            image_tokenizer, revision, token, cache_dir, local_files_only) and options of
            `mmdlm.harnesses.options.HarnessOptions`.

    Raises:
        ValueError: For an unknown name or a bad value.
    """

    def __init__(
        self,
        pretrained: str | Model = "emoji",
        *,
        preset: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self._rank, self._world_size = joined()
        self.subject = Subject.open(
            pretrained,
            preset=preset,
            batch_size=batch_size,
            most=max_batch_size,
            device=device_of_process(device),
            seed=seed,
            given=options,
        )
        self._device = self.subject.model.device
        self._scores: dict[str, _Scores] = {}
        self._asked: dict[str, dict[str, Any]] = {}

    # --- what lm-eval asks for --------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Estimate log p(continuation given context) of each request."""
        self._forget(requests)
        pairs = [self._pair(*request.args[:2]) for request in requests]
        names = [f"{request.args[0]}\x1f{request.args[1]}" for request in requests]
        found: dict[int, tuple[float, bool]] = {}
        for number, score in self._scored(pairs, names, [one.task_name for one in requests]):
            request = requests[number]
            self._remember(request, score)
            found[number] = (score.value, score.is_greedy)
            self.cache_hook.add_partial("loglikelihood", request.args, found[number])
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Estimate log p(text); a text longer than the model takes is scored window by window.

        Each token is scored once. A window but the first sees one token before it, and the last as
        many as fit, as lm-eval's windows do.
        """
        self._forget(requests)
        windows = [
            (number, pair)
            for number, request in enumerate(requests)
            for pair in self._windows(request.args[0])
        ]
        found = [LogLikelihood(0.0, 0.0, 0, True) for _ in requests]
        left = [sum(owner == number for owner, _ in windows) for number in range(len(requests))]
        names = [f"{requests[owner].args[0]}\x1f{a}\x1f{b}" for owner, (a, b) in windows]
        tasks = [requests[owner].task_name for owner, _ in windows]
        for place, score in self._scored([pair for _, pair in windows], names, tasks):
            number = windows[place][0]
            whole = found[number]
            found[number] = LogLikelihood(
                whole.value + score.value,
                math.hypot(whole.standard_error, score.standard_error),
                whole.tokens + score.tokens,
                whole.is_greedy and score.is_greedy,
            )
            left[number] -= 1
            if not left[number]:
                self._remember(requests[number], found[number])
                value = found[number].value
                self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, value)
        return [one.value for one in found]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Write what follows each context, up to the task's stop strings."""
        questions = [_question(request) for request in requests]
        self._note(questions)
        found: dict[int, str] = {}
        for number, text in self._shown(self.subject.answers(questions), len(questions), "Writing"):
            found[number] = text
            self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [found[number] for number in range(len(requests))]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the messages as they are, marked: the model's family lays them out.

        Names of special tokens in a message stay letters.
        """
        return CONVERSATION + json.dumps(chat_history, ensure_ascii=False)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the name of what lays out conversations, for the record."""
        template = self.subject.model.prompt_template
        own = self.tokenizer.chat_template if template.family == "mmdlm" else None
        return str(own or f"{type(template).__module__}.{type(template).__qualname__}")

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside its results: settings, and errors of likelihoods."""
        options = self.subject.options
        return {
            "mmdlm": {
                "family": self.subject.model.prompt_template.family,
                "preset": None if options.preset is None else options.preset.name,
                "options": dict(options.given),
                "seed": self.subject.seed,
                "batch_size": self.subject.batch_size,
                "generation": self._asked,
                "loglikelihood": {
                    task: _errors(list(some.values())) for task, some in self._scores.items()
                },
            }
        }

    @property
    def tokenizer(self) -> Any:
        """Return the text tokenizer, which lm-eval describes in its results."""
        return self.subject.model.text_tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Return what tells caches of requests apart."""
        return f"mmdlm-{self.subject.model.prompt_template.family}"

    @property
    def eot_token_id(self) -> int:
        """Return the id of the end of text."""
        return self.subject.model.denoiser.vocabulary.eos_id

    @property
    def max_length(self) -> int:
        """Return the most tokens of a document."""
        model = self.subject.model
        return max(model.max_length, model.prompt_template.longest)

    # --- several processes ------------------------------------------------------------------------

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all processes, one after the other."""
        if self._world_size == 1:
            return tensor
        each = [torch.empty_like(tensor) for _ in range(self._world_size)]
        dist.all_gather(each, tensor)
        return torch.stack(each)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all processes in one of them, None in the others.

        Scores go along, for the errors of whole tasks: lm-eval gathers results of all processes,
        but asks only one of them what it knows of the model.
        """
        if self._world_size == 1:
            return [obj]
        found: list[Any] | None = [None] * self._world_size if self._rank == dst else None
        dist.gather_object((obj, self._scores), found, dst=dst)
        if found is None:
            return None
        for _, scores in found:
            for task, some in scores.items():
                self._scores.setdefault(task, {}).update(some)
        return [one for one, _ in found]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self._world_size > 1:
            dist.barrier()

    # --- scores -----------------------------------------------------------------------------------

    def _scored(
        self, pairs: Sequence[tuple[Context, str]], names: list[str], tasks: list[str | None]
    ) -> Iterator[tuple[int, LogLikelihood]]:
        """Yield the number of each pair with its score, long ones first."""
        seen: dict[str, int] = {}
        seeds = [self.subject.seed_of(name, seen) for name in names]
        groups: dict[str, list[int]] = {}
        said = {task: self.subject.options.settings_for(task) for task in dict.fromkeys(tasks)}
        for number, task in enumerate(tasks):
            how = repr((said[task].get("estimator"), said[task].get("samples")))
            groups.setdefault(how, []).append(number)
        yield from self._shown(
            self._each(pairs, list(groups.values()), said, tasks, seeds), len(pairs), "Scoring"
        )

    def _each(
        self,
        pairs: Sequence[tuple[Context, str]],
        groups: list[list[int]],
        said: dict[str | None, dict[str, Any]],
        tasks: list[str | None],
        seeds: list[int],
    ) -> Iterator[tuple[int, LogLikelihood]]:
        size = self.subject.batch_size
        for numbers in groups:
            settings = said[tasks[numbers[0]]]
            if settings.get("guidance_scale") not in (None, 1):
                log.warning("log-likelihoods are estimated without guidance")
            estimator = _estimator(settings.get("estimator"))
            numbers.sort(key=lambda n: (-len(str(pairs[n][0])) - len(pairs[n][1]), n))
            for start in range(0, len(numbers), AT_ONCE * size):
                some = numbers[start : start + AT_ONCE * size]
                scores = self.subject.model.loglikelihood(
                    [pairs[n] for n in some],
                    estimator=estimator,
                    samples=settings.get("samples") or SAMPLES,
                    batch_size=size,
                    generator=[torch.Generator().manual_seed(seeds[n]) for n in some],
                )
                yield from zip(some, scores, strict=True)

    def _pair(self, context: str, continuation: str) -> tuple[Context, str]:
        """Return what `Model.loglikelihood` takes; a text loses its beginning if it is too long."""
        if context.startswith(CONVERSATION):
            return json.loads(context.removeprefix(CONVERSATION)), continuation
        length = len(self.subject.model.codec.encode(continuation))
        return self.subject.shortened(context, length), continuation

    def _windows(self, text: str) -> Iterator[tuple[str, str]]:
        """Cut a text at ends of tokens into windows that the model takes, each after a context."""
        model = self.subject.model
        offsets = model.text_tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
        )["offset_mapping"]
        begins, most = [begin for begin, _ in offsets], model.longest_text
        if len(begins) <= most:
            if text:
                yield "", text
            return
        step = most - 1  # and one token of context
        start = 0
        while start < len(begins):
            stop = min(start + step, len(begins))
            # A character of several tokens stays whole: each of them begins where it does.
            while start < stop < len(begins) and begins[stop] == begins[stop - 1]:
                stop -= 1
            if stop == start:
                raise ValueError(f"one character of the text takes more than {step} tokens")
            end = len(text) if stop == len(begins) else begins[stop]
            # blanks at its end would be scored again, with the window
            context = text[begins[max(0, stop - most)] : begins[start]].rstrip()
            piece = text[begins[start] if start else 0 : end]
            yield self.subject.shortened(context, stop - start), piece
            start = stop

    def _forget(self, requests: list[Instance]) -> None:
        """Drop the scores of an evaluation before this one."""
        for request in requests:
            self._scores.pop(str(request.task_name), None)

    def _remember(self, request: Instance, score: LogLikelihood) -> None:
        one = _Score(request.doc_id, score.value, score.standard_error, score.tokens)
        of_task = self._scores.setdefault(str(request.task_name), {})
        of_task[(request.doc_id, request.idx)] = one

    # --- texts ------------------------------------------------------------------------------------

    def _note(self, questions: list[Question]) -> None:
        """Keep how each task is asked, for the record."""
        known: set[str] = set()
        for question in questions:
            if str(question.task) not in known:
                known.add(str(question.task))
                ask = self.subject.ask(question)
                self._asked[str(question.task)] = {
                    "max_new_tokens": ask.length,
                    "think": ask.think,
                    "suppress_end": ask.suppress_end,
                    "until": list(ask.until),
                    "chat": ask.chat,
                    "generation_config": {
                        name: value
                        if isinstance(value, int | float | str | list | tuple | None)
                        else repr(value)
                        for name, value in asdict(ask.config).items()
                    },
                }

    def _shown(self, results: Iterator[Any], total: int, what: str) -> Iterator[Any]:
        with tqdm(total=total, desc=what, disable=self._rank != 0) as bar:
            for result in results:
                yield result
                bar.update(1)


def _question(request: Instance) -> Question:
    """Return a request for a text as a question."""
    context, arguments = request.args[:2]
    if not context.startswith(CONVERSATION):
        return Question(text=context, arguments=arguments, task=request.task_name)
    messages = json.loads(context.removeprefix(CONVERSATION))
    begun = ""
    if messages and messages[-1]["role"] == "assistant":  # the task's gen_prefix
        begun = messages.pop()["content"]
    return Question(
        turns=tuple((one["role"], (one["content"],)) for one in messages),
        begun=begun,
        arguments=arguments,
        task=request.task_name,
    )


def _estimator(name: str | None) -> LikelihoodEstimator | None:
    """Return the estimator of a class of `mmdlm.core.likelihood`, or of a class path."""
    if name is None:
        return None
    known = [one for one in likelihoods.__all__ if one not in ("LikelihoodEstimator", "Nelbo")]
    near = nearest(name, known)
    if near is not None and near.lower() == name.lower().replace("_", ""):
        found = getattr(likelihoods, near)()
        assert isinstance(found, LikelihoodEstimator)
        return found
    made = part_of(name, LikelihoodEstimator, names=tuple(known))  # type: ignore[type-abstract]
    assert isinstance(made, LikelihoodEstimator)
    return made


def _errors(scores: list[_Score]) -> dict[str, Any]:
    """Summarize the standard errors of a task.

    Of documents with several continuations, `undecided` counts those whose best one leads by less
    than two standard errors of the difference: another draw may answer them otherwise.
    """
    documents: dict[int | None, list[_Score]] = {}
    for score in scores:
        documents.setdefault(score.document, []).append(score)
    undecided = choices = 0
    for some in documents.values():
        if len(some) > 1:
            best, second, *_ = sorted(some, key=lambda one: -one.value)
            error = math.hypot(best.standard_error, second.standard_error)
            choices += 1
            undecided += best.value - second.value < SURE * error
    errors = [one.standard_error for one in scores]
    return {
        "requests": len(scores),
        "tokens": sum(one.tokens for one in scores),
        "standard_error_mean": sum(errors) / len(errors),
        "standard_error_largest": max(errors),
        "choices": choices,
        "undecided": undecided,
    }
