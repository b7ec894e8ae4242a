"""The script of docs/how-to/transformers.md, as it stands there, on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainingArguments

import mmdlm
from mmdlm.templates.chat_template import PLAIN
from tests.docs.blocks import blocks

PAGE = "docs/how-to/transformers.md"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_the_script_fine_tunes(
    form: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (script,) = (one for one in blocks("python") if one.page == PAGE and "sys.argv" in one.code)
    assert len(script.code.splitlines()) <= 45
    folder = tmp_path / "model"
    mmdlm.load(tiny_checkpoint).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder)
    talk = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "heart"}]
    rows = {"messages": [talk] * 50}
    if form == "prompt":
        rows = {"prompt": [talk[:1]] * 50, "completion": [talk[1:]] * 50}
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: Dataset.from_dict(rows))
    monkeypatch.setattr(
        sys, "argv", ["script.py", str(folder), "owner/data", str(tmp_path / "out")]
    )

    finished = TrainingArguments.__post_init__

    def short(self: TrainingArguments) -> None:
        self.max_steps, self.use_cpu, self.report_to = 2, True, "none"
        self.per_device_train_batch_size, self.gradient_accumulation_steps = 2, 1
        self.eval_strategy, self.disable_tqdm = "no", True
        finished(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", short)
    exec(compile(script.code, PAGE, "exec"), {"__name__": "__main__"})
    plain = mmdlm.load(folder)
    tuned = mmdlm.load(folder, adapter=tmp_path / "out")
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(plain.denoiser(ids).logits, tuned.denoiser(ids).logits)
