"""Learning from pairs: it starts from log 2, prefers what is chosen, and continues when killed."""

from __future__ import annotations

import json
import math
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmdlm
from data_pipelines.shards.shards import Sample, write_shard
from mmdlm.core.kernels import linear
from mmdlm.core.likelihood.elbo import Elbo
from mmdlm.core.likelihood.mean_field import OneStepMeanField
from mmdlm.core.sequence import Batch, Sequence, collate, pack, text_segment
from mmdlm.models.modeling import MmdlmForMaskedDiffusion
from mmdlm.rl.preference import Vrpo
from tests.core.fakes import rng
from tests.templates.tiny import transformer, words_of
from tests.train.tiny import Run, be_one_of_two, logged, preference, shard_weights, trajectory
from train.preference import PreferenceStage, answers
from train.rollouts.reference import Reference
from train.stages.low_rank import LowRank
from train.stages.meter import MEASURED

TRL = ("chosen", "rejected", "accuracies", "margins")


class NoLoader:
    """Where nothing was skipped."""

    def stats(self) -> list[dict[str, Any]]:
        return []


def document(prompt: str, answer: str) -> Sequence:
    words = words_of("llada")
    given, said = (
        text_segment(words.encode_with_specials(prompt)),
        text_segment(words.encode_with_specials(answer), target=True),
    )
    return Sequence((given, said))


def pairs(*texts: tuple[str, str, str]) -> list[Sequence]:
    return [
        Sequence(document(prompt, chosen).segments, partner=document(prompt, rejected))
        for prompt, chosen, rejected in texts
    ]


TEXTS = [("hi", "yes", "no"), ("2+2=", "4", "fish"), ("a", "bcde", "fg")]


def stage_of(model: MmdlmForMaskedDiffusion, *, adapted: bool = False, **loss: Any) -> Any:
    reference = Reference(model, adapted=adapted, needed=True)
    return PreferenceStage(model, reference, Elbo(repeats=2, strata=1), Vrpo(**loss), NoLoader())


def policy() -> MmdlmForMaskedDiffusion:
    return transformer(words_of("llada").vocabulary).float().train()


def batch() -> Batch:
    return collate(pairs(*TEXTS), words_of("llada").vocabulary)


def total(stage: Any, batch: Batch, *, seed: int = 0) -> tuple[Tensor, dict[str, float]]:
    """The loss of a step, and its terms divided by their counts."""
    stage.begin(0)
    noise = stage.draw(batch, generator=rng(seed))
    sums, counts = stage(batch, noise), stage.counts(batch, noise)
    means = {name: sums[name] / counts[name] for name in sums}
    loss = sum(weight * means[name] for name, weight in stage.coefficients.items())
    return loss, {name: float(value.detach()) for name, value in means.items()}


# ---- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True])
def test_a_policy_that_is_its_reference_has_log_2(adapted: bool) -> None:
    """To the last bit, as times and masks are shared; the fine-tuning term is its own bound."""
    model = policy()
    if adapted:
        LowRank(rank=2, targets=("q_proj",)).onto(model, seed=0)
    stage = stage_of(model, adapted=adapted)
    loss, means = total(stage, batch())
    assert means["preference"] == pytest.approx(math.log(2), rel=1e-6)
    assert means["sft"] > 0
    assert float(loss.detach()) == pytest.approx(math.log(2) + 0.05 * means["sft"], rel=1e-6)
    logged_of_it = stage.statistics()
    assert all(logged_of_it[f"rewards/{name}"] == 0 for name in TRL)


def test_the_gradient_points_to_the_chosen_answer() -> None:
    """A small step along it raises the chosen bounds against the rejected ones, at the same noise.

    At the start it is that of -beta / 2 (B(y_w) - B(y_l)).
    """
    model, here = policy(), batch()
    stage = stage_of(model, sft=0.0)
    loss, _ = total(stage, here)
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (views,) = stage.estimator.draw(here, model.vocabulary, generator=rng(0))
    scores = stage.estimator.log_prob(model, here, views)
    won, lost = answers(here, scores, scores.detach())
    (-0.1 * (won.policy - lost.policy).mean()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gradient:
                parameter -= 1e-3 * gradient[name]
    total(stage, here)
    assert stage.statistics()["rewards/margins"] > 0


def test_packed_rows_are_the_same_pairs() -> None:
    """Rows of two pairs and of one, against rows of one each, at what needs no noise."""
    model, vocabulary = policy(), words_of("llada").vocabulary
    estimator = OneStepMeanField(prompt_mask_prob=0)
    found = []
    for rows in (batch(), pack(pairs(*TEXTS), vocabulary, length=24)):
        scores = estimator(model, rows, generator=rng())
        found.append((*answers(rows, scores, 2 * scores), len(rows)))
    (won, lost, many), (won_packed, lost_packed, few) = found
    assert (many, few) == (3, 2)
    for alone, beside in ((won, won_packed), (lost, lost_packed)):
        torch.testing.assert_close(
            alone.policy.sort().values, beside.policy.sort().values, rtol=1e-4, atol=1e-4
        )
        assert alone.tokens.sort().values.equal(beside.tokens.sort().values)
        torch.testing.assert_close(alone.reference, 2 * alone.policy)
    assert won.tokens.tolist() == [len(chosen) for _, chosen, _ in TEXTS]
    assert lost.tokens.tolist() == [len(rejected) for _, _, rejected in TEXTS]
    stage = stage_of(model)
    counts = stage.counts(pack(pairs(*TEXTS), vocabulary, length=24), None)
    assert {int(count) for count in counts.values()} == {3}


# ---- runs ----------------------------------------------------------------------------------------


def said(number: int, chosen: str = "yes", rejected: str = "no!") -> Sample:
    content = {"prompt": f"q{number}", "chosen": chosen, "rejected": rejected}
    return {"__key__": f"{number:03d}", "json": json.dumps(content).encode()}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    words = words_of("llada")
    published = {
        "model_type": "llada",
        "d_model": 32,
        "vocab_size": words.vocabulary.size,
        "embedding_size": words.vocabulary.size,
        "mask_token_id": words.vocabulary.mask_id,
        "eos_token_id": words.vocabulary.eos_id,
        "pad_token_id": words.vocabulary.pad_id,
    }
    model = transformer(words.vocabulary, published={"family": "llada", "config": published})
    model.float().save_pretrained(folder)
    words.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, start: Path) -> dict[str, Any]:
    write_shard(tmp_path / "pairs" / "0.tar", map(said, range(8)))
    return {
        "model": {"start_from": str(start)},
        "data": {
            "sources": [
                {
                    "urls": str(tmp_path / "pairs"),
                    "to_sequence": "data_pipelines.sources.preferences.Preference",
                }
            ],
            "batch_size": 2,
            "length": 140,
            "packed": True,
            "shuffle_buffer": 5,
        },
        "estimator": {
            "class_path": "mmdlm.core.likelihood.elbo.Elbo",
            "init_args": {"repeats": 2, "strata": 1, "at_once": 2},
        },
        "training": {
            "max_steps": 5,
            "ema": 0.0,
            "save_steps": 2,
            "logging_steps": 1,
            "optimizer": {
                "class_path": "train.optimizer.AdamW",
                "init_args": {"learning_rate": 1e-2},
            },
        },
        "examples": 1,
        "threads": 1,
    }


def written(config: dict[str, Any], out: Path) -> list[str]:
    path = out.with_suffix(".json")
    path.write_text(json.dumps(config))
    return ["--config", str(path), "--out", str(out)]


def train(config: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """Run it here; the lines of its log."""
    argv = sys.argv
    try:
        preference(written(config, out))
    finally:
        sys.argv = argv
    return logged(out)


@pytest.mark.slow
def test_it_learns_to_prefer(config: dict[str, Any], tmp_path: Path) -> None:
    """From log 2; margins rise; both answers were shown, each with what of it is learned."""
    config["training"] |= {"max_steps": 25, "save_steps": 100}
    entries = train(config, tmp_path / "out")
    assert entries[0]["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(f"rewards/{name}" in entries[0] for name in TRL)
    assert entries[-1]["rewards/margins"] > 1
    assert set(MEASURED) <= set(entries[-1])
    assert entries[-1]["rewards/accuracies"] == 1.0
    assert entries[-1]["loss/preference"] < 0.4
    shown = (tmp_path / "out" / "examples.txt").read_text()
    assert "yes<|eot_id|>" in shown
    assert "no!<|eot_id|>" in shown
    assert mmdlm.load(tmp_path / "out" / "final").prompt_template.family == "llada"


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_a_run_that_is_killed_continues_exactly(
    lora: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    """Killed while it writes its second checkpoint; the same seed gives the same losses."""
    config["model"]["lora"] = lora
    whole = Run(preference, written(config, tmp_path / "whole"), folder=tmp_path)
    killed = Run(preference, written(config, tmp_path / "killed"), "step_00000004", folder=tmp_path)
    assert whole.exit_code() == 0, whole.errors.read_text()[-3000:]
    assert killed.exit_code() == -signal.SIGKILL, killed.errors.read_text()[-3000:]
    assert (tmp_path / "killed" / "step_00000002").exists()
    assert not (tmp_path / "killed" / "step_00000004").exists()
    train(config, tmp_path / "killed")
    assert len(logged(tmp_path / "whole")) == 5
    assert trajectory(tmp_path / "killed") == trajectory(tmp_path / "whole")
    assert (tmp_path / "killed" / "adapter").exists() == (lora is not None)


def one_of_two(arguments: list[str], rank: int, port: int, sharded: bool) -> None:
    be_one_of_two(rank, port)
    if sharded:
        shard_weights("TRANSFORMER_BASED_WRAP")
    linear._LEAST = 0  # as in models that are not tiny
    preference(arguments)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_equal_one_with_twice_the_accumulation(
    sharded: bool, config: dict[str, Any], tmp_path: Path
) -> None:
    """The same pairs in their order, at what needs no noise; weights whole, or FSDP2's parts.

    Of three views two are computed again for the gradient.
    """
    config["estimator"] = {"class_path": "tests.train.own_parts.Thrice"}
    config["data"] |= {"packed": False, "batch_size": 1, "shuffle_buffer": 0}
    config["training"] |= {"max_steps": 3}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = written(config, tmp_path / "two")
    runs = [Run(one_of_two, arguments, rank, port, sharded, folder=tmp_path) for rank in (0, 1)]
    config["training"] |= {"gradient_accumulation_steps": 2}
    alone = train(config, tmp_path / "alone")
    for run in runs:
        assert run.exit_code() == 0, run.errors.read_text()[-3000:]
    for one, both in zip(alone, logged(tmp_path / "two"), strict=True):
        for name in set(one) - set(MEASURED):
            assert both[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


# ---- bad input -----------------------------------------------------------------------------------


def test_pairs_that_cannot_be_used_are_counted(config: dict[str, Any], tmp_path: Path) -> None:
    """One without a difference, and one whose prompt fills the row."""
    long = {"prompt": "x" * 140, "chosen": "yes", "rejected": "no"}
    bad = [said(8, "no", "no"), {"__key__": "009", "json": json.dumps(long).encode()}]
    write_shard(tmp_path / "pairs" / "0.tar", [*map(said, range(8)), *bad])
    config["data"] |= {"max_broken": 0.5}
    config["training"] |= {"max_steps": 6}
    assert train(config, tmp_path / "out")[-1]["pairs/skipped"] >= 2


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"model": {"start_from": "emoji", "lora": {"dropout": 0.1}}},
            "the policy would differ from its reference by noise",
        ),
        (
            {"estimator": "mmdlm.core.likelihood.trajectory.TrajectoryReplay"},
            "it replays a rollout, and none was given",
        ),
        (
            {"to_sequence": "data_pipelines.sources.conversations.Conversation"},
            "makes no pairs of answers",
        ),
    ],
)
def test_a_bad_recipe(
    changes: dict[str, Any],
    says: str,
    config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if to_sequence := changes.pop("to_sequence", None):
        config["data"]["sources"][0]["to_sequence"] = to_sequence
    with pytest.raises(SystemExit) as status:
        train({**config, **changes}, tmp_path / "out")
    assert status.value.code == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]
