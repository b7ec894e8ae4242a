"""A checkpoint records which tasks its recipe taught it; others are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

import mmdlm
from data_pipelines.shards.shards import write_shard
from data_pipelines.sources.conversations import Conversation
from data_pipelines.sources.image_text import ImageText, Tasks
from data_pipelines.sources.preferences import Preference
from data_pipelines.sources.source import Source, ToSequence, encode_array
from data_pipelines.sources.text import Text
from data_pipelines.sources.vision_samples import SeenCaption
from mmdlm.cli import main as cli
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.pipeline.inputs import pillow_image
from mmdlm.templates.auto import LAYOUTS, prompt_template_for
from mmdlm.templates.chat_template import PLAIN
from mmdlm.templates.native import ABOUT_IMAGES, DESCRIBE
from mmdlm.templates.task_prompt import Turn
from mmdlm.vision.tokenizers.auto import load_image_tokenizer
from tests.models import foreign
from tests.templates.tiny import ids_of, transformer, words_of
from tests.train.tiny import Run, sft
from train.trained_tasks import SAMPLES, SHARDS, record_tasks, some_samples

TEXTS = {"infill", "complete"}
DRAWN = {"text_to_image", "inpaint"}
TALK = {"answer", "chat"}


def asked(question: str, answer: str, **more: Any) -> dict[str, Any]:
    """A conversation, or with `chosen` and `rejected` a pair of them."""
    return {"prompt": question, **({"completion": answer} if answer else {}), **more}


@pytest.mark.parametrize(
    "source, content, taught",
    [
        (ImageText(Tasks(draw=1, caption=0)), [], DRAWN),
        (ImageText(Tasks(draw=0, caption=1)), [], {"caption", *TEXTS}),
        (ImageText(Tasks(draw=0, caption=0, joint=1)), [], {"caption", *TEXTS, *DRAWN}),
        (ImageText(Tasks(draw=0, caption=0, text=1)), [], TEXTS),
        (Text(max_tokens=8), [], TEXTS),
        (SeenCaption(), [], {"caption"}),
        (Conversation(), [asked("hi", "yes")], TALK),
        (Conversation(), [asked("<image> what?", "a cat")], {*TALK, ABOUT_IMAGES}),
        (Conversation(), [asked("<image> make it red", "<image>")], {"edit"}),
        (Conversation(), [asked("a cat", "<image>")], DRAWN),
        (Conversation(), [asked("hi", "yes"), asked("a cat", "<image>")], {*TALK, *DRAWN}),
        (Conversation(), [{"messages": "broken"}, asked("hi", "yes")], TALK),
        (Conversation(template=False), [asked("one two", "three")], {"complete"}),
        (Conversation(template=False), [asked("<image>", "a cat")], {"caption"}),
        (Conversation(template=False), [asked("a cat", "<image>")], DRAWN),
        (Preference(), [asked("hi", "", chosen="yes", rejected="no")], TALK),
    ],
    ids=lambda one: str(sorted(one) if isinstance(one, set) else one),  # alike in every process
)
def test_what_a_source_teaches(
    source: ToSequence, content: list[Any], taught: set[str], tmp_path: Path
) -> None:
    samples = [{"__key__": str(n), "json": json.dumps(c).encode()} for n, c in enumerate(content)]
    assert source.teaches(samples) == taught


def test_samples_are_taken_from_several_places(tmp_path: Path) -> None:
    """A kind that stands in one of many shards, or behind a shard that is broken, is seen."""
    for number in range(3 * SHARDS):
        samples = [{"__key__": f"{n}", "txt": b"%d" % number} for n in range(SAMPLES + 5)]
        write_shard(tmp_path / f"{number:02d}.tar", samples)
    (tmp_path / "00.tar").write_bytes(b"broken")
    numbers = [int(s["txt"]) for s in some_samples(Source(str(tmp_path), Text(max_tokens=8)))]
    assert sorted(set(numbers)) == [3, 6, 9, 12, 15, 18, 21]
    assert len(numbers) == 7 * SAMPLES


class Unknown(ToSequence):
    """A source of one's own, which does not say what it teaches."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        raise AssertionError


def tiny(**options: Any) -> tuple[MmdlmForMaskedDiffusion, PreTrainedTokenizerFast]:
    words = words_of("mmada")
    return transformer(words.vocabulary, **options), words.tokenizer


def test_a_model_records_what_it_could_and_what_it_learns(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "0.tar", [{"__key__": "0", "json": json.dumps(asked("hi", "yes")).encode()}]
    )
    talk = Source(str(tmp_path), Conversation())
    prompt_template, (denoiser, words) = LAYOUTS["mmdlm"], tiny()
    record_tasks(denoiser, prompt_template, words, [talk], is_new=True)
    assert denoiser.config.trained_tasks == ["answer", "chat"]
    drawn = Source(str(tmp_path), ImageText(Tasks(draw=1, caption=0)))
    record_tasks(denoiser, prompt_template, words, [drawn], is_new=False)
    assert denoiser.config.trained_tasks == ["text_to_image", "inpaint", "answer", "chat"]

    # one without a record could do all that the layout has
    denoiser, words = tiny()
    record_tasks(denoiser, prompt_template, words, [talk], is_new=False)
    assert {"caption", "inpaint", "chat"} <= set(denoiser.config.trained_tasks)
    assert "edit" not in denoiser.config.trained_tasks
    denoiser, words = tiny()
    words.chat_template = PLAIN
    record_tasks(denoiser, prompt_template, words, [talk], is_new=False)
    assert "edit" in denoiser.config.trained_tasks

    # nothing is made up
    for other, source in ((prompt_template, Source("x", Unknown())), (LAYOUTS["llada"], talk)):
        denoiser, words = tiny()
        record_tasks(denoiser, other, words, [source, talk], is_new=True)
        assert denoiser.config.trained_tasks is None


def test_a_model_is_for_what_it_records() -> None:
    words = words_of("mmada").tokenizer
    words.chat_template = PLAIN
    older = prompt_template_for(None)
    assert {"edit", "chat", "caption"} <= set(older.tasks_with(words))
    prompt_template = prompt_template_for(None, tasks=["text_to_image", "answer", "chat"])
    assert prompt_template.tasks_with(words) == (
        "text_to_image",
        "draw_trajectory",
        "answer",
        "chat",
    )
    with pytest.raises(
        ValueError, match=r"not trained for edit; it is for text_to_image, answer and chat"
    ):
        prompt_template.require("edit", words)
    words.chat_template = None
    assert prompt_template.tasks_with(words) == ("text_to_image", "draw_trajectory")
    with pytest.raises(ValueError, match=r"not trained yet, and not for caption"):
        prompt_template_for(None, tasks=[]).require("caption", words)
    for record in ("caption", [3]):
        with pytest.raises(ValueError, match="trained_tasks = .*; a list of names is needed"):
            prompt_template_for(None, tasks=record)  # type: ignore[arg-type]
    assert prompt_template_for("llada", tasks=["caption"]) is LAYOUTS["llada"]


@pytest.mark.slow
def test_a_converted_model_has_learned_texts_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.autoregressive("qwen2", tmp_path / "theirs")
    command = ["convert", "--from", str(tmp_path / "theirs"), str(tmp_path / "start")]
    assert cli.main(command) == 0
    assert cli.main(["draw", "a", "-o", "x.png", "--model", str(tmp_path / "start")]) == 2
    said = capsys.readouterr().err
    assert "was not trained for text_to_image; it is for infill and complete" in said
    assert isinstance(mmdlm.load(tmp_path / "start").complete("red"), str)


# ---- the whole way ------------------------------------------------------------------------------

NAMES = ("red heart", "woman")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A new model that was begun to be taught to talk about images, in conversations alone."""
    folder = tmp_path_factory.mktemp("talker")
    images = load_image_tokenizer(tiny_checkpoint / "image_tokenizer")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(len(NAMES), 3, 16, 16, generator=generator) * 2 - 1
    samples = []
    for number, (name, codes) in enumerate(zip(NAMES, images.encode(pixels), strict=True)):
        levels = ((pixels[number] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(folder / f"{number}.png")
        samples.append(
            {
                "__key__": str(number),
                "json": json.dumps(asked(f"<image> {DESCRIBE}", name)).encode(),
                "codes.npy": encode_array(codes.numpy().astype(np.uint16)),
            }
        )
    write_shard(folder / "talks" / "0.tar", samples)
    tail = {
        "class_path": "data_pipelines.sources.end_of_text.FilledTail",
        "init_args": {"longest": 4},
    }
    config: dict[str, Any] = {
        "model": {
            "shape": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
            "text_tokenizer": str(tiny_checkpoint),
            "image_tokenizer": str(tiny_checkpoint / "image_tokenizer"),
        },
        "data": {
            "sources": [
                {
                    "urls": str(folder / "talks"),
                    "to_sequence": {
                        "class_path": "data_pipelines.sources.conversations.Conversation",
                        "init_args": {"tail": tail},
                    },
                }
            ],
            "batch_size": 2,
            "length": 64,
        },
        "objective": {
            "process": {
                "class_path": "mmdlm.core.diffusion.forward.Absorbing",
                "init_args": {"schedule": "mmdlm.core.diffusion.schedule.Linear"},
            },
            "text": {"loss_normalization": "sequence"},
            "complementary": True,
        },
        "training": {
            "max_steps": 2,
            "ema": 0.0,
            "optimizer": {
                "class_path": "train.optimizer.AdamW",
                "init_args": {"learning_rate": 0.1},
            },
        },
        "threads": 1,
    }
    (folder / "recipe.yaml").write_text(json.dumps(config))
    arguments = ["--config", str(folder / "recipe.yaml"), "--out", str(folder / "out")]
    run = Run(sft, arguments, folder=folder)
    assert run.exit_code() == 0, run.errors.read_text()[-3000:]
    return folder


def test_captions_are_asked_for_as_they_were_learned(
    talker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a conversation: the layout of pretraining it has never seen."""
    final = talker / "out" / "final"
    config = json.loads((final / "config.json").read_text())
    assert config["trained_tasks"] == ["answer", "chat", ABOUT_IMAGES]
    files = [str(talker / f"{number}.png") for number in range(len(NAMES))]
    assert cli.main(["caption", *files, "--model", str(final)]) == 0
    said = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    model = mmdlm.load(final)
    question = [{"role": "user", "content": f"<image>{DESCRIBE}"}]
    room = {"max_new_tokens": 64, "num_inference_steps": 64}
    assert said == [model.chat(question, file, **room) for file in files]
    ((codes,),) = model.look([[pillow_image(files[0])]], "caption")
    ours, others, theirs = (
        ids_of(prompt_template.caption_prompt(model.codec, codes, length=8).sequence)
        for prompt_template in (
            model.prompt_template,
            prompt_template_for(None, tasks=["caption", "chat"]),
            prompt_template_for(None),
        )
    )
    turns = (Turn("user", (codes, DESCRIBE)),)
    assert ours == ids_of(model.prompt_template.chat_prompt(model.codec, turns, length=8).sequence)
    assert others == theirs != ours


def test_what_it_was_not_trained_for_is_one_sentence(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the record, as in older checkpoints, all that the layout has is taken for trained."""
    final = Path(shutil.copytree(talker / "out" / "final", tmp_path / "final"))
    out = str(tmp_path / "out.png")
    edit = ["edit", str(talker / "0.png"), "--prompt", "redder", "-o", out, "--model", str(final)]
    assert cli.main(edit) == 2
    said = capsys.readouterr().err
    assert "not trained for edit; it is for caption, answer and chat" in said
    assert cli.main(["infill", "a [MASK]", "--model", str(final)]) == 2
    assert "not trained for infill" in capsys.readouterr().err
    config = json.loads((final / "config.json").read_text())
    (final / "config.json").write_text(json.dumps({**config, "trained_tasks": None}))
    assert cli.main(edit) == 0
    mmdlm.load(talker / "out" / "final").save_pretrained(tmp_path / "saved")
    assert cli.main([*edit[:-1], str(tmp_path / "saved")]) == 2
