"""A model of one's own learns to talk: converted or from nothing, tuned, asked line by line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

import mmdlm
from data_pipelines.sources.conversations import Conversation, TemplatedConversation
from data_pipelines.sources.end_of_text import NoTail
from data_pipelines.sources.messages import Message
from data_pipelines.text_tokenizer import train_text_tokenizer
from data_pipelines.write_shards import conversations
from mmdlm.cli import main as cli
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.lora import TASKS
from mmdlm.templates.auto import LAYOUTS
from mmdlm.templates.chat_template import PLAIN
from mmdlm.templates.text_codec import TextCodec
from tests.models import foreign
from tests.templates.tiny import CHATML
from tests.train.tiny import Run, sft

ROOT = Path(__file__).parents[2]
SUBJECTS = "cat dog sun moon tree fish king rain"
COLORS = "red blue green white black"


def talk(number: int, subject: str) -> list[str]:
    """Two questions with their answers; the second one cannot be answered without the first."""
    color = COLORS.split()[number % 5]
    return [f"say {subject}", f"a {subject}", "its color?", f"{subject} is {color}"]


TALKS = [talk(number, subject) for number, subject in enumerate(SUBJECTS.split())]


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Each word of the conversations is a token."""
    texts = [text for one in TALKS for text in one]
    words = train_text_tokenizer([*texts, "user assistant You are kind."] * 3, size=400)
    if template is not None:
        names = ["<|im_start|>", "<|im_end|>"]
        words.add_special_tokens({"additional_special_tokens": names})
        words.chat_template = template
    return words


def recipe(folder: Path, model: dict[str, Any], **options: Any) -> Path:
    """configs/sft/chat.yaml for a few short conversations, and as JSON lines in shards."""
    roles = ("user", "assistant") * 2
    lines = [
        {"messages": [{"role": r, "content": t} for r, t in zip(roles, one, strict=False)]}
        for whole in TALKS
        for one in (whole[:2], whole)
    ]
    source = folder / "talks.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    conversations(str(source), folder / "talks")
    config = yaml.safe_load((ROOT / "configs/sft/chat.yaml").read_text())
    del config["out"]
    config["data"] |= {"batch_size": 8, "length": 64, "packed": False}
    config["data"]["sources"][0]["urls"] = str(folder / "talks")
    config["data"]["sources"][0]["to_sequence"]["init_args"]["tail"]["init_args"]["longest"] = 3
    config["training"] |= {"max_steps": 300, "gradient_accumulation_steps": 1, "save_steps": 1000}
    config["training"]["optimizer"]["init_args"]["learning_rate"] = 3e-3
    path = folder / "recipe.yaml"
    config["model"] |= {"save_dtype": "float32", **model}
    path.write_text(json.dumps({**config, "threads": 1, **options}))
    return path


def trained(path: Path, *more: str) -> Path:
    out = path.parent / "out"
    run = Run(sft, ["--config", str(path), "--out", str(out), *more], folder=path.parent)
    assert run.exit_code() == 0, run.errors.read_text()[-3000:]
    return out / "final"


def said(
    folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any, *more: str
) -> list[str]:
    """What `mmdlm chat` answers over a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    assert cli.main(["chat", "--model", str(folder), "--max-new-tokens", "6", *more]) == 0
    return str(capsys.readouterr().out).splitlines()


def test_the_recipe_shows_no_answer_what_comes_after_it() -> None:
    """A later question may quote the answer: the model would learn to copy it from there."""
    config = yaml.safe_load((ROOT / "configs/sft/chat.yaml").read_text())
    given = config["data"]["sources"][0]["to_sequence"]["init_args"]
    known = tokenizer(CHATML)
    codec = TextCodec(
        known, Vocabulary.build(text_size=len(known), eos_id=int(known.eos_token_id or 0))
    )
    roles = ("user", "assistant") * 2
    messages = [Message(r, t) for r, t in zip(roles, TALKS[0], strict=True)]
    conversation = Conversation(answers=given["answers"], tail=NoTail())
    spoken = TemplatedConversation(conversation, LAYOUTS["mmdlm"], codec, 64)
    learned = set()
    for seed in range(8):
        document = spoken.document(messages, [], generator=torch.Generator().manual_seed(seed))
        target = torch.cat([segment.target for segment in document.segments])
        ids = torch.cat([segment.ids for segment in document.segments])
        first = int(target.nonzero()[0])
        assert target[first:].all()
        learned.add(known.decode(ids[first:]))
    assert learned == {"a cat<|im_end|>", "cat is red<|im_end|>"}  # each of them, in its turn


@pytest.mark.slow
def test_a_converted_model_learns_to_talk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under its own chat template, turn after turn."""
    foreign.autoregressive(
        "qwen2", tmp_path / "theirs", tokenizer=tokenizer(CHATML), hidden_size=64
    )
    assert cli.main(["convert", "--from", str(tmp_path / "theirs"), str(tmp_path / "start")]) == 0
    final = trained(recipe(tmp_path, {"start_from": str(tmp_path / "start")}))
    for asked, first, again, second in TALKS:
        assert said(final, [asked, again], monkeypatch, capsys) == [first, second]


@pytest.mark.slow
def test_a_tokenizer_without_a_chat_template_is_saved_with_a_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with decoding that writes from left to right, but for what the recipe says."""
    foreign.autoregressive("qwen2", tmp_path / "theirs", tokenizer=tokenizer(None))
    assert cli.main(["convert", "--from", str(tmp_path / "theirs"), str(tmp_path / "start")]) == 0
    assert cli.main(["chat", "--model", str(tmp_path / "start")]) == 2
    assert "has no chat template, which train.sft on conversations" in capsys.readouterr().err
    few = ["--training.max_steps", "2", "--data.packed", "true"]
    generation_config = {"answer": {"num_inference_steps": 6}}
    final = trained(
        recipe(
            tmp_path, {"start_from": str(tmp_path / "start")}, generation_config=generation_config
        ),
        *few,
    )
    words = PreTrainedTokenizerFast.from_pretrained(final)
    assert words.chat_template == PLAIN
    answer = json.loads((final / "generation_config.json").read_text())["answer"]
    assert answer == {"num_inference_steps": 6, "order": "left_to_right", "min_new_tokens": 1}
    (line,) = said(final, ["say cat"], monkeypatch, capsys)
    assert line


@pytest.mark.slow
def test_an_adapter_brings_what_its_base_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Template, decoding and tasks: base and adapter say what the final weights say."""
    foreign.autoregressive("qwen2", tmp_path / "theirs", tokenizer=tokenizer(None))
    start = tmp_path / "start"
    assert cli.main(["convert", "--from", str(tmp_path / "theirs"), str(start)]) == 0
    few = ["--training.max_steps", "2", "--model.lora", "{rank: 2, alpha: 4}"]
    generation_config = {"answer": {"num_inference_steps": 5}}
    final = trained(
        recipe(tmp_path, {"start_from": str(start)}, generation_config=generation_config), *few
    )
    adapter = tmp_path / "out" / "adapter"
    lines = ["say cat", "its color?"]
    both = said(start, lines, monkeypatch, capsys, "--adapter", str(adapter))
    assert len(both) == 2
    assert both == said(final, lines, monkeypatch, capsys)

    merged = mmdlm.load(start, adapter=adapter, merge_adapter=True)
    merged.save_pretrained(tmp_path / "saved")
    for folder in (final, tmp_path / "saved"):
        config = json.loads((folder / "config.json").read_text())
        assert config["trained_tasks"] == ["infill", "complete", "answer", "chat"]
        assert mmdlm.load(folder).defaults.answer.num_inference_steps == 5
    with pytest.raises(ValueError, match="not trained for caption; it is for infill, complete, a"):
        merged.prompt_template.require("caption", merged.text_tokenizer)

    for content, says in ((b"3", "holds 3; a list of names"), (b"[", "cannot be read")):
        (adapter / TASKS).write_bytes(content)
        with pytest.raises(ValueError, match=says):
            mmdlm.load(start, adapter=adapter)
    (adapter / TASKS).unlink()  # of another program's: nothing is known
    assert "chat" in mmdlm.load(start, adapter=adapter).prompt_template.tasks_with(
        merged.text_tokenizer
    )
