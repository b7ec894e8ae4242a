"""Pretraining goes on from a converted model, and what turns with the steps is resumed exactly."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from data_pipelines.shards.shards import write_shard
from mmdlm.core.sequence import Sequence, collate, pack, text_segment
from mmdlm.core.vocabulary import Vocabulary
from mmdlm.models.checkpoints.to_diffusion import convert_to_diffusion
from tests.models import foreign
from tests.train.tiny import Run, logged, pretrain, trajectory
from train.stages.annealing import AttentionAnnealing

WORDS = Vocabulary(size=12, text=(0, 12), image=(12, 12), mask_id=11, pad_id=0, eos_id=0)


def recipe(folder: Path, model: Path, **options: Any) -> Path:
    """Texts of the tokenizer's own words, packed."""
    write_shard(
        folder / "texts.tar",
        [{"__key__": f"{i:02d}", "txt": text.encode()} for i, text in enumerate(foreign.TEXTS)],
    )
    config = {
        "model": {"start_from": str(model), "text_tokenizer": str(model)},
        "data": {
            "sources": [
                {
                    "urls": str(folder / "texts.tar"),
                    "to_sequence": {
                        "class_path": "data_pipelines.sources.text.Text",
                        "init_args": {"max_tokens": 20},
                    },
                }
            ],
            "batch_size": 3,
            "length": 24,
            "packed": True,
        },
        "objective": {
            "process": {
                "class_path": "mmdlm.core.diffusion.forward.Absorbing",
                "init_args": {"schedule": "mmdlm.core.diffusion.schedule.Linear"},
            }
        },
        "training": {
            "max_steps": 6,
            "gradient_accumulation_steps": 2,
            "optimizer": {"class_path": "train.optimizer.AdamW"},
            "save_steps": 2,
            "logging_steps": 1,
            "ema": 0.5,
        },
        "threads": 1,
        **options,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(config))
    return path


def run(path: Path, out: Path, *more: str, killed_before: str | None = None) -> Run:
    arguments = ["--config", str(path), "--out", str(out), *more]
    return Run(pretrain, arguments, killed_before, folder=path.parent)


@pytest.mark.slow
def test_an_autoregressive_model_turns_bidirectional_and_resumes(tmp_path: Path) -> None:
    foreign.autoregressive("qwen2", tmp_path / "theirs", tie_word_embeddings=True)
    list(convert_to_diffusion(tmp_path / "theirs", tmp_path / "ours"))
    path = recipe(tmp_path, tmp_path / "ours", annealing={"steps": 5})
    whole = run(path, tmp_path / "whole")
    killed = run(path, tmp_path / "killed", killed_before="step_00000004")
    at_once = run(path, tmp_path / "at_once", "--annealing", "null")
    assert killed.exit_code() == -signal.SIGKILL
    resumed = run(path, tmp_path / "killed")
    for one in (whole, at_once, resumed):
        assert one.exit_code() == 0, one.errors.read_text()[-3000:]
    assert len(logged(tmp_path / "whole")) == 6
    assert trajectory(tmp_path / "killed") == trajectory(tmp_path / "whole")
    assert trajectory(tmp_path / "at_once") != trajectory(tmp_path / "whole")

    before = AutoModel.from_pretrained(tmp_path / "ours")
    after = AutoModel.from_pretrained(tmp_path / "whole" / "final")
    assert after.config.shift
    assert after.vocabulary == before.vocabulary
    assert after.lm_head.weight is after.model.embed_tokens.weight
    changed = [not torch.equal(t, before.state_dict()[n]) for n, t in after.state_dict().items()]
    assert all(changed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_an_encoder_goes_on(kind: str, tmp_path: Path) -> None:
    foreign.encoder(kind, tmp_path / "theirs")
    list(convert_to_diffusion(tmp_path / "theirs", tmp_path / "ours"))
    path = recipe(tmp_path, tmp_path / "ours")
    one = run(path, tmp_path / "out", "--training.max_steps", "3")
    assert one.exit_code() == 0, one.errors.read_text()[-3000:]
    before = AutoModel.from_pretrained(tmp_path / "ours")
    after = AutoModel.from_pretrained(tmp_path / "out" / "final")
    assert type(after) is type(before)
    states = before.state_dict(), after.state_dict()
    assert states[0].keys() == states[1].keys()
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


# ---- the schedule -------------------------------------------------------------------------------


def packed() -> Any:
    """Two rows, whose longest documents have 10 and 7 tokens."""
    texts = [Sequence((text_segment([1] * n, target=True),)) for n in (10, 7, 3)]
    return pack(texts, WORDS, length=10)


def test_it_grows_from_causal_to_everything() -> None:
    annealing = AttentionAnnealing(steps=10, sampled=False)
    batch, generator = packed(), torch.Generator()
    seen = [annealing.lookahead(batch, step, generator=generator) for step in range(12)]
    assert seen[0] is not None
    assert seen[0].tolist() == [0, 0]
    assert seen[5] is not None
    assert seen[5].tolist() == [4, 3]  # half of 9 and of 6
    assert seen[10] is None
    assert seen[11] is None


def test_what_is_drawn_lies_between_nothing_and_the_most() -> None:
    annealing = AttentionAnnealing(steps=3)
    batch = collate([Sequence((text_segment([1] * 10, target=True),))] * 400, WORDS)
    drawn = annealing.lookahead(batch, 2, generator=torch.Generator().manual_seed(0))
    assert drawn is not None
    assert sorted(set(drawn.tolist())) == list(range(7))  # two thirds of 9
    assert 2.5 < float(drawn.float().mean()) < 3.5


def test_steps_must_be_some() -> None:
    with pytest.raises(ValueError, match="steps is 0"):
        AttentionAnnealing(steps=0)
