"""Let lmms-eval ask a model: several images a question, batches, and images for tasks that draw.

An installed mmdlm registers itself by the entry point group `lmms_eval.models`:
`lmms-eval eval --model mmdlm --model_args pretrained=X --tasks pope`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from mmdlm.harnesses.options import SAMPLING, sampling_of
from mmdlm.harnesses.processes import device_of_process, joined
from mmdlm.harnesses.subject import Question, Said, Subject
from mmdlm.pipeline.inputs import ImageLike
from mmdlm.pipeline.model import Model

TEXT, IMAGE = WRITES = ("text", "image")


def manifest() -> ModelManifest:
    """Return what lmms-eval registers."""
    return ModelManifest(model_id="mmdlm", chat_class_path=f"{__name__}.MmdlmVision")


class MmdlmVision(lmms):
    """A masked-diffusion model for lmms-eval, of any family that sees or draws.

    Answers have the tokens that each question has on its own, whatever the batch.

    Args:
        pretrained: Bundled name, folder, or OWNER/NAME of the Hugging Face Hub; in Python also a
            model.
        preset: Published settings, see `mmdlm.harnesses.published`.
        batch_size: Questions at once, or "auto".
        max_batch_size: Most of them where batch_size is "auto".
        device: Default: a CUDA GPU if there is one, else the CPU.
        seed: Of all random numbers, together with each question.
        writes: "text", or "image" for tasks that draw: a prompt without images is drawn, one with
            images is an instruction to edit them.
        images: Folder of drawn images, one folder for each task.
        system_prompt: A text, or the path of a file of it, said first in every conversation.
        **options: Arguments of `mmdlm.load` (dtype, quantization, adapter, merge_adapter,
            image_tokenizer, revision, token, cache_dir, local_files_only) and options of
            `mmdlm.harnesses.options.HarnessOptions`.

    Raises:
        ValueError: For an unknown name or a bad value.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | Model = "emoji",
        *,
        preset: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        writes: str = TEXT,
        images: str = "runs/eval/lmms_eval_images",
        system_prompt: str = "",
        **options: Any,
    ) -> None:
        super().__init__()
        if writes not in WRITES:
            raise ValueError(f"writes {writes!r} is not one of {', '.join(WRITES)}")
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
        self.writes, self.images = writes, Path(images)
        self.system_prompt = self._resolve_system_prompt(system_prompt)

    @property
    def device(self) -> torch.device:
        """Return the device of the model, on which lmms-eval gathers results."""
        return self.subject.model.device

    @property
    def batch_size(self) -> int:
        """Return how many questions are asked at once."""
        return self.subject.batch_size

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer each question, or draw what it asks for.

        An answer that is an image is the JSON object that lmms-eval's tasks of drawing expect:
        {"text": "", "images": [path]}.
        """
        found: dict[int, str] = {}
        results = self._images(requests) if self.writes == IMAGE else self._texts(requests)
        with tqdm(total=len(requests), desc="Answering", disable=self._rank != 0) as bar:
            for number, text in results:
                found[number] = text
                bar.update(1)
        return [found[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answer in rounds: the task makes the next question of the answers before it."""
        said: list[list[str]] = [[] for _ in requests]
        infos: list[Any] = [None] * len(requests)
        open_ = list(range(len(requests)))
        while open_:
            questions, asked = [], []
            for number in open_:
                messages, infos[number] = self._next_round(
                    requests[number], said[number], infos[number]
                )
                if messages is not None:
                    questions.append(self._question(requests[number], messages))
                    asked.append(number)
            for place, text in self.subject.answers(questions):
                said[asked[place]].append(text)
            open_ = asked
        return said

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: tasks of messages are answered in words."""
        raise NotImplementedError(
            "lmms-eval asks chat models for words, and scores texts only with simple models; score "
            "texts with lm-eval: python -m eval.lm_eval"
        )

    # --- questions --------------------------------------------------------------------------------

    def _texts(self, requests: Sequence[Instance]) -> Iterator[tuple[int, str]]:
        questions = [self._question(one, self._messages(one)) for one in requests]
        return self.subject.answers(questions)

    def _messages(self, request: Instance) -> Any:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return doc_to_messages(self.task_dict[task][split][doc_id])

    def _next_round(
        self, request: Instance, said: list[str], info: Any
    ) -> tuple[list[dict[str, Any]] | None, Any]:
        """Return the messages of the next round, None after the last, and what the task keeps."""
        if not said:
            return self._messages(request), info
        _, doc_to_messages, _, doc_id, task, split = request.args
        payload = doc_to_messages(
            self.task_dict[task][split][doc_id],
            round_idx=len(said),
            previous_output=list(said),
            previous_round_info=info,
        )
        if not isinstance(payload, tuple) or len(payload) != 4 or payload[1]:
            return None, info
        return payload[0], payload[3]

    def _question(self, request: Instance, messages: Sequence[Mapping[str, Any]]) -> Question:
        turns = [_said(one) for one in messages]
        if self.system_prompt and (not turns or turns[0][0] != "system"):
            turns.insert(0, ("system", (self.system_prompt,)))
        arguments, (doc_id, task, split) = request.args[2], request.args[3:6]
        words = [part for _, parts in turns for part in parts if isinstance(part, str)]
        return Question(
            turns=tuple(turns),
            arguments=arguments,
            task=task,
            key="\x1f".join([task, split, str(doc_id), *words]),
        )

    # --- images -----------------------------------------------------------------------------------

    def _images(self, requests: Sequence[Instance]) -> Iterator[tuple[int, str]]:
        """Draw or edit, and write the images."""
        questions = [self._question(one, self._messages(one)) for one in requests]
        seen: dict[str, int] = {}
        paths, waiting = [], []
        for number, (request, question) in enumerate(zip(requests, questions, strict=True)):
            seed = self.subject.seed_of(question.key, seen)
            doc_id, task = request.args[3:5]
            again = f"_{seen[question.key]}" if seen[question.key] else ""
            paths.append(self.images / str(task) / f"{doc_id}{again}.png")
            waiting.append((number, question, seed))
        groups: dict[tuple[str | None, str], list[tuple[int, Question, int]]] = {}
        for one in waiting:
            groups.setdefault((one[1].task, repr(one[1].arguments)), []).append(one)
        for (task, _), some in groups.items():
            said = self._drawing(some[0][1], task)
            drawn = [one for one in some if not one[1].images]
            for start in range(0, len(drawn), self.subject.batch_size):
                batch = drawn[start : start + self.subject.batch_size]
                pictures = said.text_to_image(
                    [_words(question) for _, question, _ in batch],
                    generator=[torch.Generator().manual_seed(seed) for *_, seed in batch],
                )
                for (number, *_), picture in zip(batch, pictures, strict=True):
                    yield number, _written(picture, paths[number])
            for number, question, seed in some:
                if question.images:
                    picture = said.edit(
                        question.images,
                        _words(question),
                        generator=torch.Generator().manual_seed(seed),
                    )
                    yield number, _written(picture, paths[number])

    def _drawing(self, question: Question, task: str | None) -> Any:
        """Return the model with the sampling that the user and the preset say.

        Arguments of the task are those of texts (max_new_tokens, temperature 0): only what names a
        field of the sampler alone counts.
        """
        requested, _ = sampling_of(question.arguments or {})
        for name in ("temperature", "max_new_tokens"):
            requested.pop(name, None)
        said = {**requested, **self.subject.options.settings_for(task)}
        values = {name: value for name, value in said.items() if name in SAMPLING}
        return self.subject.with_drawing(values)


def _said(message: Mapping[str, Any]) -> Said:
    """Return a message of lmms-eval as a role with text and images in reading order.

    Raises:
        ValueError: For sound and video, and what is no message.
    """
    content = message["content"]
    if isinstance(content, str):
        return message["role"], (content,)
    parts: list[str | ImageLike] = []
    for one in content:
        if one["type"] == "text":
            parts.append(one["text"])
        elif one["type"] == "image":
            parts.append(one["url"])
        else:
            raise ValueError(
                f"a message has content of type {one['type']!r}, but the model takes text and "
                "images; leave the task out"
            )
    return message["role"], tuple(parts)


def _words(question: Question) -> str:
    return "\n".join(p for _, parts in question.turns for p in parts if isinstance(p, str)).strip()


def _written(picture: Any, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return json.dumps({"text": "", "images": [str(path.resolve())]})
