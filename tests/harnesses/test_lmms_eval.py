"""lmms-eval asks a model: yes or no on images in POPE's form, several images, rounds, drawing."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mmdlm
from mmdlm.core.likelihood.token_scores import token_log_prob
from mmdlm.core.sequence import collate
from mmdlm.pipeline.model import Model
from mmdlm.templates.chat_template import PLAIN
from mmdlm.templates.task_prompt import Turn

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from mmdlm.harnesses.lmms_eval import MmdlmVision

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "eval" / "demo_images"
PRESENT = ("blue heart", "octopus", "red apple", "rocket")


def asked(
    documents: list[Any], messages: Callable[..., Any], **arguments: Any
) -> tuple[list[Instance], dict[str, Any]]:
    """Requests as lmms-eval makes them for chat models, and its table of documents."""
    arguments = {"max_new_tokens": 4, "do_sample": False, **arguments}
    made = [
        Instance(
            "generate_until",
            ("", messages, arguments, n, "t", "test"),
            0,
            {"task": "t", "doc_id": n, "repeats": 1},
        )
        for n in range(len(documents))
    ]
    return made, {"t": {"test": documents}}


def emoji(name: str) -> Image.Image:
    return Image.open(IMAGES / f"{name.replace(' ', '-')}.png").convert("RGB")


def said(*parts: str | Image.Image, role: str = "user") -> dict[str, Any]:
    return {
        "role": role,
        "content": [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "url": part}
            for part in parts
        ],
    }


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The bundled model, with a chat template and room for it: it talks, about anything."""
    folder = tmp_path_factory.mktemp("talking") / "emoji"
    shutil.copytree(ROOT / "mmdlm" / "checkpoints" / "emoji", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": PLAIN}))
    return replace(mmdlm.load(folder, device="cpu"), max_length=128)


def test_a_batch_answers_as_each_alone(talking: Model) -> None:
    documents = [("blue heart", "red?"), ("octopus", "a fish?"), ("rocket", "man")]
    made, table = asked(documents, lambda one: [said(emoji(one[0]), one[1])])
    alone, together = MmdlmVision(talking), MmdlmVision(talking, batch_size=3)
    alone.task_dict = together.task_dict = table
    found = alone.generate_until(made)
    assert together.generate_until(made) == found
    expected = talking.answer(documents[0][1], emoji("blue heart"), max_new_tokens=4)
    assert found[0].strip() == expected


def test_rounds_are_asked_one_after_the_other(talking: Model) -> None:
    def messages(
        document: int, *, round_idx: int = 0, previous_output: Any = None, **rest: Any
    ) -> Any:
        if round_idx == 0:
            return [said("red?")]
        return [said(f"not {previous_output[-1]}"[:9])], round_idx > document, None, None

    made, table = asked([0, 1, 2], messages)
    harness = MmdlmVision(talking, batch_size=2)
    harness.task_dict = table
    rounds = harness.generate_until_multi_round(made)
    assert [len(one) for one in rounds] == [1, 2, 3]
    assert len({one[0] for one in rounds}) == 1  # the first question is the same


def test_tasks_that_draw_get_files_of_images(talking: Model, tmp_path: Path) -> None:
    made, table = asked(["red heart", "rocket"], lambda text: [said(text)], temperature=0)
    harness = MmdlmVision(
        talking, writes="image", images=str(tmp_path), batch_size=2, num_inference_steps=2
    )
    harness.task_dict = table
    first, second = (json.loads(one) for one in harness.generate_until(made))
    assert first["images"] == [str(tmp_path / "t" / "0.png")]
    assert Image.open(second["images"][0]).size == (64, 64)
    alone = MmdlmVision(
        talking, writes="image", images=str(tmp_path / "alone"), num_inference_steps=2
    )
    alone.task_dict = table
    again = [json.loads(one)["images"][0] for one in alone.generate_until(made)]
    for one, other in zip((first, second), again, strict=True):
        assert Path(one["images"][0]).read_bytes() == Path(other).read_bytes()


def test_what_a_model_cannot_take_is_refused(talking: Model) -> None:
    video = {"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}
    made, table = asked([0], lambda _: [video])
    harness = MmdlmVision(talking)
    harness.task_dict = table
    with pytest.raises(ValueError, match="video"):
        harness.generate_until(made)
    with pytest.raises(ValueError, match="writes"):
        MmdlmVision(talking, writes="sound")
    with pytest.raises(NotImplementedError, match="lm_eval"):
        harness.loglikelihood(made)


def test_an_installed_mmdlm_registers_itself() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["mmdlm"].partition(":")
    registry = ModelRegistryV2()
    registry.register_manifest(getattr(import_module(module), name)())
    assert registry.get_model_class("mmdlm") is MmdlmVision


@pytest.fixture(scope="module")
def yes_or_no(talking: Model) -> Model:
    """The bundled model, tuned for seconds until it knows what a few images show."""
    template, codec = talking.prompt_template, talking.codec
    seen = talking.look([[emoji(name)] for name in PRESENT], "answer")
    rows = [
        template.training_sequence(
            codec,
            (
                Turn("user", (image, question(shown))),
                Turn("assistant", ("yes" if shown == name else "no",)),
            ),
            answers=[1],
        )
        for name, (image,) in zip(PRESENT, seen, strict=True)
        for shown in PRESENT[:2]
    ]
    batch = collate(rows, codec.vocabulary)
    masked = batch.ids.masked_fill(batch.target, codec.vocabulary.mask_id)
    denoiser = talking.denoiser
    assert isinstance(denoiser, torch.nn.Module)
    learner = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
    for _ in range(40):
        log_prob = token_log_prob(denoiser, masked, batch, where=batch.target)
        loss = -log_prob.sum() / batch.target.sum()
        learner.zero_grad()
        loss.backward()
        learner.step()
        if loss < 0.05:
            break
    return talking


TASK = """\
task: pope_local
dataset_path: {folder}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pope_doc_to_visual
doc_to_text: !function utils.pope_doc_to_text
doc_to_target: answer
process_results: !function utils.pope_process_results
generation_kwargs: {{max_new_tokens: 2, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: pope_accuracy, aggregation: !function utils.pope_aggregate_accuracy,
      higher_is_better: true}}
lmms_eval_specific_kwargs: {{default: {{pre_prompt: "", post_prompt: ""}}}}
"""


def question(name: str) -> str:
    return f"Is there a {name}?"


@pytest.mark.slow
def test_pope_on_a_local_file(
    yes_or_no: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    # It reaches into filelock 3 for loads that wait for each other, of which there are none here.
    locks = evaluator._enable_reentrant_filelocks
    monkeypatch.setattr(locks, "_patched", True, raising=False)

    rows = [
        {
            "question_id": str(number),
            "question": question(shown),
            "answer": "yes" if shown == name else "no",
            "image": emoji(name),
        }
        for number, (name, shown) in enumerate(
            (name, shown) for name in PRESENT for shown in PRESENT[:2]
        )
    ]
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "pope")
    (tmp_path / "utils.py").write_text("from lmms_eval.tasks.pope.utils import *\n")
    (tmp_path / "pope_local.yaml").write_text(TASK.format(folder=tmp_path / "pope"))
    harness = MmdlmVision(yes_or_no, batch_size=4)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False, model_name="mmdlm")
    found = evaluator.simple_evaluate(
        harness, tasks=["pope_local"], task_manager=manager, bootstrap_iters=0
    )
    assert found["results"]["pope_local"]["pope_accuracy,none"] == 1.0
