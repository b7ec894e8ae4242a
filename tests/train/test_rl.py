"""Reinforcement learning from the command line: killed, it continues exactly; bad input is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import mmdlm
from data_pipelines.shards.shards import write_shard
from mmdlm.cli.recipe import run
from mmdlm.core.likelihood.base import LikelihoodEstimator
from mmdlm.core.likelihood.structured import StructuredNoise
from mmdlm.models.auto import PretrainedDenoiser
from mmdlm.rl.advantage import AccuracyFilter
from mmdlm.rl.rollout import Rollout
from mmdlm.rl.statistics import Statistics
from mmdlm.tasks.countdown import Countdown as CountdownProblem
from mmdlm.tasks.sudoku import split_grids
from tests.train.rewarding import assert_learned
from tests.train.tiny import Run, logged
from train.rl import main
from train.rollouts.answering import Write
from train.rollouts.loader import Rollouts
from train.rollouts.prompts import Countdown, Lines, Names, Sudoku
from train.rollouts.rollout_batch import MicroBatch
from train.rollouts.statistics import logged as written
from train.rollouts.statistics import statistics_of
from train.stages.meter import MEASURED

ROOT = Path(__file__).parents[2]
TRL = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/letters/mean",
    "rewards/letters/std",
    "kl",
    "entropy",
    "clip_ratio/region_mean",
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "num_tokens",
    "rollout_share",
    "scoring_share",
    "prompts/skipped",
    *MEASURED,
)
TIMINGS = (*MEASURED, "rollout_share", "scoring_share")
WRITE = {
    "class_path": "train.rollouts.answering.Write",
    "init_args": {"max_new_tokens": 6, "num_inference_steps": 3},
}
DRAW = {"class_path": "train.rollouts.answering.Draw", "init_args": {"num_inference_steps": 2}}
STRUCTURED = {"class_path": "mmdlm.core.likelihood.structured.StructuredNoise"}
MEAN_FIELD = {"class_path": "mmdlm.core.likelihood.mean_field.OneStepMeanField"}


def surrogate(**options: Any) -> dict[str, Any]:
    return {"class_path": "mmdlm.rl.policy_loss.ClippedSurrogate", "init_args": options}


def reward(name: str, **options: Any) -> dict[str, Any] | str:
    path = f"tests.train.rewarding.{name}"
    return {"class_path": path, "init_args": options} if name[0].isupper() else path


@pytest.fixture
def config(tmp_path: Path, tiny_checkpoint: Path) -> dict[str, Any]:
    """A tiny run that writes words."""
    prompts = tmp_path / "prompts.jsonl"
    words = ["red", "heart", "woman dark", "woman", "light", "skin tone", "tone"]
    prompts.write_text("".join(json.dumps({"prompt": w, "answer": w}) + "\n" for w in words))
    return {
        "out": str(tmp_path / "run"),
        "model": {"start_from": str(tiny_checkpoint)},
        "prompts": {
            "class_path": "train.rollouts.prompts.Lines",
            "init_args": {"path": str(prompts), "chat": False},
        },
        "answering": WRITE,
        "reward_config": {
            "rubric": {"rewards": {"letters": reward("Letters")}},
            "advantage": {"class_path": "mmdlm.rl.advantage.Standardized"},
        },
        "estimator": STRUCTURED,
        "loss": surrogate(beta=0.1),
        "prompts_per_batch": 2,
        "num_generations": 3,
        "num_iterations": 3,
        "log_completions_every": 1,
        "training": {
            "max_steps": 9,
            "gradient_accumulation_steps": 2,
            "optimizer": {
                "class_path": "train.optimizer.AdamW",
                "init_args": {"learning_rate": 0.003},
            },
            "ema": 0.0,
            "save_steps": 100,
            "logging_steps": 1,
        },
        "threads": 1,
    }


def rl(config: dict[str, Any], **changes: Any) -> Path:
    """Run it here; `model`, `training` and `reward_config` are merged, all else is replaced."""
    whole = {**config, **changes}
    for name in ("model", "training", "reward_config"):
        whole[name] = {**config[name], **changes.get(name, {})}
    path = Path(whole["out"]).with_suffix(".json")
    path.write_text(json.dumps(whole))
    before, sys.argv = sys.argv, ["rl", "--config", str(path)]
    try:
        run(main)
    finally:
        sys.argv = before
    return Path(whole["out"])


def in_process(
    config: dict[str, Any], folder: Path, *, rank: int | None = None, port: int = 0
) -> Run:
    return Run(elsewhere, config, rank, port, folder=folder)


def elsewhere(config: dict[str, Any], rank: int | None, port: int) -> None:
    """The same in a process of its own, or one of two."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if rank is not None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    rl({**config, "out": config["out"]})


def trajectory(out: Path) -> list[str]:
    """Every logged number but the timings, to the last digit."""
    return [
        json.dumps({k: v for k, v in entry.items() if k not in TIMINGS}) for entry in logged(out)
    ]


def tables(out: Path) -> dict[str, bytes]:
    """With the sheets of images."""
    return {path.name: path.read_bytes() for path in (out / "completions").iterdir()}


# ---- resume -------------------------------------------------------------------------------------


def killed_and_whole(config: dict[str, Any], folder: Path, *, call: int) -> Path:
    """The folder of a run killed in a call of its rewards and started again, with checkpoints in
    the middle of sets of rollouts: all it writes is what one writes that was not killed.
    """
    settings = {**config["training"], "save_steps": 2}
    rubric = config["reward_config"]["rubric"]

    def deadly(name: str, call: int) -> dict[str, Any]:
        lethal = reward("Lethal", mark=str(folder / f"mark_{name}"), call=call)
        rewards = {**rubric["rewards"], "lethal": lethal}
        reward_config = {**config["reward_config"], "rubric": {**rubric, "rewards": rewards}}
        out = str(folder / name)
        return {**config, "out": out, "reward_config": reward_config, "training": settings}

    killed = in_process(deadly("killed", call), folder)
    whole = rl(deadly("whole", 0))
    assert killed.exit_code() == -signal.SIGKILL, killed.errors.read_text()[-3000:]
    out = folder / "killed"
    assert [path.name for path in sorted(out.glob("step_*"))] == ["step_00000002"]
    assert torch.load(out / "step_00000002" / "loader_0.pt")["micro_batches"]
    again = in_process(deadly("killed", call), folder)
    assert again.exit_code() == 0, again.errors.read_text()[-3000:]
    assert trajectory(out) == trajectory(whole)
    assert tables(out) == tables(whole)
    return out


@pytest.mark.slow
def test_a_run_killed_in_a_rollout_and_between_inner_iterations_gives_the_same_losses(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """Two calls of the reward a set of rollouts, and three steps; checkpoints in the middle."""
    # the second set of rollouts is half made: the run goes on from step 2, of the first set, whose
    # last step is then learned from rollouts that are in the checkpoint alone
    out = killed_and_whole(config, tmp_path, call=4)
    assert len({entry["loss/policy"] for entry in logged(out)}) > 5


@pytest.mark.slow
def test_a_run_of_images_that_is_killed_between_inner_iterations_gives_the_same_losses(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The smoke run of images, on a tiny model."""
    recipe = yaml.safe_load((ROOT / "configs" / "rl" / "smoke.yaml").read_text())
    recipe["prompts"]["init_args"]["urls"] = str(ROOT / recipe["prompts"]["init_args"]["urls"])
    recipe["gallery"]["urls"] = str(ROOT / recipe["gallery"]["urls"])
    recipe["training"]["max_steps"] = 6
    # a tiny model draws no emoji: all its images are as far from them, but not as bright
    rewards = recipe["reward_config"]["rubric"]["rewards"]
    rewards["bright"] = reward("Brightness")
    recipe["model"]["start_from"] = str(tiny_checkpoint)
    config = {**recipe, "num_iterations": 3, "threads": 1}
    out = killed_and_whole(config, tmp_path, call=2)
    assert_learned(logged(out), rewards)
    assert len({entry["loss/policy"] for entry in logged(out)}) > 3


def test_a_checkpoint_between_sets_of_rollouts_holds_none(config: dict[str, Any]) -> None:
    out = rl(config, training={"max_steps": 3})
    state = torch.load(out / "step_00000003" / "loader_0.pt")
    assert state["micro_batches"] == []
    assert state["given"] == 6


def test_other_numbers_cannot_go_on(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rl(config, training={"max_steps": 2, "save_steps": 2})
    with pytest.raises(SystemExit):
        rl(config, num_generations=4)
    assert "(2, 3, 2, 3) and cannot go on with (2, 4, 2, 3)" in capsys.readouterr().err


# ---- processes ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_equal_one_with_twice_the_accumulation(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config = {**config, "reward_config": {**config["reward_config"], "keep": {}}}
    alone = rl(
        config,
        out=str(tmp_path / "alone"),
        training={"max_steps": 5, "gradient_accumulation_steps": 4},
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {**config["training"], "max_steps": 5}
    two = {**config, "training": settings}
    runs = [
        in_process({**two, "out": str(tmp_path / "two")}, tmp_path, rank=rank, port=port)
        for rank in (0, 1)
    ]
    for one in runs:
        assert one.exit_code() == 0, one.errors.read_text()[-3000:]
    for one, both in zip(logged(alone), logged(tmp_path / "two"), strict=True):
        for name in set(one) - set(TIMINGS):
            assert both[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), (name, one["step"])


# ---- what it computes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns(config: dict[str, Any]) -> None:
    """The letter that is rewarded becomes more frequent."""
    out = rl(
        config,
        num_iterations=2,
        num_generations=8,
        training={"max_steps": 60},
        loss=surrogate(),
        estimator=MEAN_FIELD,
        log_completions_every=0,
    )
    rewards = [entry["reward"] for entry in logged(out)]
    assert sum(rewards[-10:]) / 10 > 2 * sum(rewards[:4]) / 4 + 0.1, rewards
    assert not (out / "completions").exists()
    model = mmdlm.load(out / "final")
    assert isinstance(model.complete("red", max_new_tokens=6), str)


@pytest.mark.slow
def test_without_an_update_the_policy_is_the_old_one_and_the_reference(
    config: dict[str, Any],
) -> None:
    """The views and scores that are shared agree to the last bit, in each iteration."""
    still = {"class_path": "tests.train.tiny.Plain", "init_args": {"learning_rate": 0.0}}
    for name, loss in {
        "old": surrogate(beta=0.1, anchor="old"),
        "reference": surrogate(beta=0.1),
    }.items():
        out = rl(
            config,
            out=f"{config['out']}_{name}",
            training={"max_steps": 3, "optimizer": still},
            loss=loss,
            model={"lora": {"rank": 2} if name == "reference" else None},
        )
        for entry in logged(out):
            assert entry["kl"] == 0.0
            assert entry["clip_ratio/region_mean"] == 0.0
            assert entry["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["copy", "adapter"])
def test_the_reference_stays_what_it_was(
    config: dict[str, Any], lora: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy moves away from it, and its scores are those of the model it started from."""
    seen: list[tuple[PretrainedDenoiser, MicroBatch]] = []
    flight = Rollouts._micro_batch

    def kept(self: Rollouts, number: int, micro: int) -> MicroBatch:
        made = flight(self, number, micro)
        start = mmdlm.load(config["model"]["start_from"], device="cpu").denoiser
        seen.append((start, made))
        return made

    monkeypatch.setattr(Rollouts, "_micro_batch", kept)
    out = rl(
        config,
        model={"lora": lora},
        num_generations=16,
        training={"gradient_accumulation_steps": 1},
    )
    kl = [entry["kl"] for entry in logged(out)]
    assert kl[0] == 0.0
    assert kl[6] > 1e-6  # at the first iteration of a round it is not the old policy
    estimator = StructuredNoise()
    for start, made in seen:
        for look in made.scored_views:
            assert look.reference is not None
            with torch.no_grad():
                expected = estimator.scores(start, made.batch, look.views).log_prob
            torch.testing.assert_close(look.reference.log_prob, expected, atol=1e-5, rtol=0)


def test_equal_rewards_move_nothing(config: dict[str, Any]) -> None:
    """Neither does weight decay."""
    out = rl(
        config,
        reward_config={"rubric": {"rewards": {"same": reward("Always")}}},
        loss=surrogate(),
        training={"max_steps": 3},
    )
    for entry in logged(out):
        assert entry["grad_norm"] == 0.0
        assert entry["frac_reward_zero_std"] == 1.0
        assert entry["skipped_steps"] == entry["step"]
    start, end = (
        load_file(Path(folder) / "model.safetensors")
        for folder in (config["model"]["start_from"], out / "final")
    )
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_the_filter_leaves_out_groups_that_are_all_right(config: dict[str, Any]) -> None:
    reward_config = {"rubric": {"rewards": {"same": reward("Always")}}, "keep": {}, "right": "same"}
    out = rl(config, reward_config=reward_config, training={"max_steps": 1})
    (entry,) = logged(out)
    assert entry["completions/learned_ratio"] == 0.0
    assert "entropy" not in entry
    assert entry["skipped_steps"] == 1


@pytest.mark.slow
def test_a_step_in_which_every_group_was_filtered_leaves_the_policy_as_it_is(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learned before does not go on by momentum."""
    learns = AccuracyFilter.__call__
    rounds = []

    def keeps(self: AccuracyFilter, right: Any, *, group: Any) -> Any:
        rounds.append(len(rounds))
        return learns(self, right, group=group) & (len(rounds) <= 2)  # the first step of all

    monkeypatch.setattr(AccuracyFilter, "__call__", keeps)
    rubric = {"rewards": {"letters": reward("SomeLetters")}}
    config = {**config, "reward_config": {**config["reward_config"], "rubric": rubric, "keep": {}}}
    weights = []
    for steps in (1, 4):
        out = rl(
            {**config, "out": f"{config['out']}_{steps}"},
            num_iterations=1,
            training={"max_steps": steps},
        )
        rounds.clear()
        weights.append(load_file(out / "final" / "model.safetensors"))
    assert [entry.get("skipped_steps", 0) for entry in logged(out)] == [0, 1, 2, 3]
    assert logged(out)[0]["grad_norm"] > 0
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_log_has_the_names_of_trl(config: dict[str, Any]) -> None:
    out = rl(config, training={"max_steps": 2})
    entry = logged(out)[-1]
    for name in TRL:
        assert name in entry, name
    rows = [
        json.loads(line)
        for line in (out / "completions" / "completions_00000001.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 6
    assert {"step", "prompt", "completion", "letters", "reward", "advantage"} <= set(rows[0])
    assert [row["prompt"] for row in rows[:3]] == [rows[0]["prompt"]] * 3
    for prompts in (rows[:3], rows[3:]):
        assert sum(row["advantage"] for row in prompts) == pytest.approx(0, abs=1e-4)
    readable = (out / "completions" / "completions_00000001.txt").read_text()
    assert readable.count(">>>") == 6


def test_deviations_are_of_all_completions_together() -> None:
    class Breakdown:
        total = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
        rewards = {"some": total}  # noqa: RUF012
        skipped: dict[str, Any] = {}  # noqa: RUF012
        metrics: dict[str, float] = {}  # noqa: RUF012

    class Rollout:
        def statistics(self) -> Statistics:
            return Statistics()

    every = torch.ones(4, dtype=torch.bool)
    group = torch.tensor([0, 0, 1, 1])
    one = statistics_of(Rollout(), Breakdown(), every, group=group)  # type: ignore[arg-type]
    twice = torch.cat([Breakdown.total, Breakdown.total])
    assert written(one)["rewards/some/std"] == pytest.approx(float(Breakdown.total.std()))
    assert written(one + one)["rewards/some/std"] == pytest.approx(float(twice.std()))
    assert written(one + one)["reward"] == 2.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "loss"),
    [
        ({"class_path": "Coupled"}, surrogate()),
        (
            {"class_path": "TrajectoryReplay"},
            surrogate(
                loss_normalization="sequence", anchor="old", beta=0.01, kl_normalization="view"
            ),
        ),
        (
            {"class_path": "TrajectoryReplay", "init_args": {"with_order": True}},
            surrogate(level="product"),
        ),
        (MEAN_FIELD, {"class_path": "mmdlm.rl.policy_loss.Wd1"}),
        (
            {"class_path": "mmdlm.experimental.block_random.BlockRandom"},
            {"class_path": "mmdlm.experimental.spg.Spg"},
        ),
        ({"class_path": "Elbo", "init_args": {"repeats": 2, "strata": 2}}, surrogate()),
    ],
)
def test_every_estimator_and_loss_is_a_line_of_yaml(
    config: dict[str, Any], estimator: dict[str, Any], loss: dict[str, Any]
) -> None:
    out = rl(config, estimator=estimator, loss=loss, training={"max_steps": 3})
    assert logged(out)[0]["grad_norm"] > 0
    assert len(logged(out)) == 3


@pytest.mark.slow
def test_an_order_and_a_rule_of_ones_own_are_lines_of_yaml(config: dict[str, Any]) -> None:
    """By class path alone, or with arguments; the rollouts are those of the named order."""

    def losses(name: str, **sampler: Any) -> list[str]:
        init_args = {"sampler": {"num_inference_steps": 3, "temperature": 1.0, **sampler}}
        answering = {"class_path": "train.rollouts.answering.Write", "init_args": init_args}
        out = Path(config["out"]) / name
        return trajectory(rl(config, out=str(out), answering=answering, training={"max_steps": 2}))

    (Path(config["out"])).mkdir()
    named = losses("named", order="left_to_right")
    own = losses("own", order="tests.train.own_parts.Reading")
    both = losses(
        "both",
        order={"class_path": "tests.train.own_parts.Reading", "init_args": {"sign": 1.0}},
        schedule={"class_path": "tests.train.own_parts.Half"},
    )
    assert own == named
    assert both != named


def test_scores_are_over_what_the_sampler_can_draw(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the policy, the old one and the reference; at first they are those of the rollout."""
    scores, sample, given, rollouts = LikelihoodEstimator.scores, Rollout.sample, [], []

    def kept(self: Any, denoiser: Any, batch: Any, views: Any, **options: Any) -> Any:
        found = scores(self, denoiser, batch, views, **options)
        given.append((options["undrawable"], batch.ids, found.total.detach()))
        return found

    def sampled(*arguments: Any, **options: Any) -> Rollout:
        rollouts.append(sample(*arguments, **options))
        return rollouts[-1]

    monkeypatch.setattr(LikelihoodEstimator, "scores", kept)
    monkeypatch.setattr(Rollout, "sample", sampled)
    sampler = {"num_inference_steps": 3, "temperature": 1.0, "suppress_tokens": [3, 5, 8]}
    rl(
        config,
        answering={
            "class_path": "train.rollouts.answering.Write",
            "init_args": {"sampler": sampler},
        },
        estimator={"class_path": "mmdlm.core.likelihood.trajectory.TrajectoryReplay"},
        num_iterations=2,
        training={"max_steps": 2, "gradient_accumulation_steps": 1},
    )
    assert len(given) == 4  # reference and old, and the policy twice: of the same views
    assert len({undrawable for undrawable, _, _ in given}) == 1
    assert given[0][0][:3] == (3, 5, 8)
    (rollout,) = rollouts
    assert not torch.isin(rollout.batch.ids[rollout.scored], torch.tensor([3, 5, 8])).any()
    expected = torch.where(rollout.scored, rollout.log_prob, 0.0)
    for _, ids, total in given[:3]:
        assert torch.equal(ids, rollout.batch.ids)
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_rollouts_survive_a_checkpoint(config: dict[str, Any], tmp_path: Path) -> None:
    out = rl(config, training={"max_steps": 1})
    state = torch.load(out / "step_00000001" / "loader_0.pt")["micro_batches"][0]
    flight = MicroBatch.from_state(state)
    torch.save(flight.state_dict(), tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt")
    assert _same(again, state)
    assert len(flight.scored_views) == 3
    assert flight.scored_views[0].old is None
    assert flight.scored_views[1].old is not None
    assert all(look.reference is not None for look in flight.scored_views)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


# ---- images -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_images_are_learned_by_the_same_loop(config: dict[str, Any], tmp_path: Path) -> None:
    out = rl(
        config,
        answering=DRAW,
        estimator={**STRUCTURED, "init_args": {"schedule": "mmdlm.core.diffusion.schedule.Cosine"}},
        reward_config={"rubric": {"rewards": {"bright": reward("Brightness")}}},
        model={"lora": {"rank": 2}},
        training={"max_steps": 30, "gradient_accumulation_steps": 1},
        num_generations=6,
        loss=surrogate(),
        log_completions_every=2,
    )
    entries = logged(out)
    assert all(entry["completions/mean_length"] == 16 for entry in entries)
    assert entries[-1]["brightness"] == pytest.approx(entries[-1]["rewards/bright/mean"])
    assert [p.name for p in sorted((out / "completions").glob("*.png"))] == [
        f"completions_{step:08d}.png" for step in (1, 7, 13, 19, 25)
    ]
    with Image.open(out / "completions" / "completions_00000001.png") as sheet:
        assert sheet.size[0] > 0
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    drawn = mmdlm.load(out / "final").text_to_image("red", num_inference_steps=2)
    assert drawn[0].size == (16, 16)


# ---- budgets ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_budget_of_tokens_ends_the_run_as_its_last_step_would(config: dict[str, Any]) -> None:
    """Twelve rollouts of at most six tokens a set, three steps each."""
    out = rl(config, budget={"tokens": 80})
    entries = logged(out)
    steps = len(entries)
    assert steps in (4, 7)
    assert entries[-1]["completions/num_tokens"] >= 80
    assert entries[steps - 4]["completions/num_tokens"] < 80
    before = trajectory(out)
    (out / "final" / "config.json").unlink()
    rl(config, budget={"tokens": 80})
    assert trajectory(out) == before
    assert (out / "final" / "config.json").is_file()


def test_a_budget_of_seconds(config: dict[str, Any]) -> None:
    out = rl(config, budget={"seconds": 1e-3}, log_completions_every=0)
    assert len(logged(out)) <= 1
    assert (out / "final").is_dir()


@pytest.mark.slow
def test_a_budget_of_seconds_is_of_all_starts_together(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that a micro-batch of rollouts moves by 10 seconds: 20 a set, for three steps."""
    clock = [0.0]
    flight = Rollouts._micro_batch

    def slow(self: Rollouts, number: int, micro: int) -> MicroBatch:
        clock[0] += 10
        return flight(self, number, micro)

    def go_on(**changes: Any) -> Path:
        clock[0] += 1000  # between two starts, which costs nothing
        return rl(config, log_completions_every=0, **changes)

    monkeypatch.setattr(Rollouts, "_micro_batch", slow)
    monkeypatch.setattr(
        "train.rollouts.loader.time", SimpleNamespace(perf_counter=lambda: clock[0])
    )
    often = {"save_steps": 2}
    out = go_on(budget={"seconds": 100}, training={**often, "max_steps": 4})
    assert torch.load(out / "step_00000004" / "loader_0.pt")["seconds"] == 40
    # As if killed behind step 2: the second set of rollouts is made again, and paid for once.
    shutil.rmtree(out / "step_00000004")
    go_on(budget={"seconds": 50}, training=often)
    assert [entry["step"] for entry in logged(out)] == list(range(1, 8))
    assert torch.load(out / "step_00000007" / "loader_0.pt")["seconds"] == 60
    before = trajectory(out)
    (out / "final" / "config.json").unlink()
    go_on(budget={"seconds": 50}, training=often)
    assert trajectory(out) == before
    assert (out / "final" / "config.json").is_file()


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said", "skipped"),
    [
        ("broken", "reward 'bad' raised RuntimeError: the server is down", 12),
        ("short", "reward 'bad' returned 5 scores for 6 completions", 12),
        ("undefined", "reward 'bad' gave completion 0 the score nan", 2),
    ],
)
def test_a_reward_that_fails_is_counted_and_the_run_survives(
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    name: str,
    said: str,
    skipped: int,
) -> None:
    rewards = {"letters": reward("Letters"), "bad": reward(name)}
    out = rl(config, reward_config={"rubric": {"rewards": rewards}}, training={"max_steps": 3})
    error = capsys.readouterr().err
    assert error.count(said) == 1, error
    for entry in logged(out):
        assert entry["rewards/bad/skipped"] == skipped
        assert entry["completions/learned_ratio"] == pytest.approx(1 - skipped / 12)
    assert all(torch.isfinite(torch.tensor(entry["grad_norm"])) for entry in logged(out))


@pytest.mark.slow
def test_code_that_never_ends_is_worth_nothing_and_the_run_survives(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three completions one ends, in a sandbox; what the model says is put aside."""
    endless = "while True: pass"
    said = [endless, "x = 1", endless]
    monkeypatch.setattr(Write, "completions", lambda *given: said)
    path = Path(config["prompts"]["init_args"]["path"])
    path.write_text(json.dumps({"prompt": "red", "tests": ["assert x == 1"]}) + "\n")
    code = {
        "class_path": "mmdlm.rl.rewards.code.unit_tests.CodeTests",
        "init_args": {"workers": 3, "sandbox": {"seconds": 1.0}},
    }
    out = rl(
        config,
        reward_config={"rubric": {"rewards": {"code": code}}},
        prompts_per_batch=1,
        num_iterations=1,
        training={"max_steps": 2, "gradient_accumulation_steps": 1},
    )
    assert [entry["step"] for entry in logged(out)] == [1, 2]
    assert_learned(logged(out), ["code"])
    for path in (out / "completions").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["completion"] for row in rows] == said
        assert [row["code"] for row in rows] == [0, 1, 0]
        late = ["more than 1 seconds" in row["code/reason"] for row in rows]
        assert late == [True, False, True]


def test_a_run_without_any_reward_ends_with_the_reason(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Five rounds of two micro-batches."""
    reward_config = {"rubric": {"rewards": {"bad": reward("broken")}}}
    with pytest.raises(SystemExit):
        rl(config, reward_config=reward_config, num_iterations=1)
    error = " ".join(capsys.readouterr().err.split())
    assert "no completion of the last 10 rollouts got a reward" in error
    assert "the server is down" in error
    assert len(logged(Path(config["out"]))) == 4


def test_a_filter_needs_a_reward_that_tells_right_from_wrong(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = {"rewards": {"large": reward("Always", value=2.5)}}
    with pytest.raises(SystemExit):
        rl(config, reward_config={"rubric": rewards, "keep": {}})
    said = "reward 'large' is 2.5, but only one in [0, 1] tells right from wrong"
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_what_takes_no_part_is_not_looked_at(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two prompts with three answers each, those are that some answers are right of."""
    rows: list[tuple[int, bool]] = []
    flight = Rollouts._micro_batch

    def kept(self: Rollouts, number: int, micro: int) -> MicroBatch:
        made = flight(self, number, micro)
        view = made.scored_views[0].views[0]
        rows.append((len(made.batch), bool(view.covered.any())))
        assert len(made.advantage) == len(view.x_t) == len(made.batch)
        return made

    monkeypatch.setattr(Rollouts, "_micro_batch", kept)
    rubric = {"rewards": {"letters": reward("SomeLetters")}}
    out = rl(config, reward_config={"rubric": rubric, "keep": {}}, num_iterations=1)
    assert {count for count, _ in rows} <= {1, 3, 6}
    assert all(count == 1 for count, covered in rows if not covered)
    assert {count for count, covered in rows if covered} & {3, 6}
    shares = [entry["completions/learned_ratio"] for entry in logged(out)]
    learned = [count if covered else 0 for count, covered in rows]
    assert shares == [
        pytest.approx((a + b) / 12) for a, b in zip(learned[::2], learned[1::2], strict=True)
    ]


@pytest.mark.slow
def test_a_prompt_that_fills_the_whole_length_is_counted_and_skipped(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(config["prompts"]["init_args"]["path"])
    lines = path.read_text().splitlines()
    long = json.dumps({"prompt": "woman " * 80, "answer": "x"})
    path.write_text("\n".join([long, *lines, long]) + "\n")
    out = rl(config)
    assert logged(out)[-1]["prompts/skipped"] in (1, 2)
    told = [one.getMessage() for one in caplog.records if "skipped prompts" in one.getMessage()]
    assert len(told) in (1, 2)
    assert "at most 63; shorten it" in told[0]
    path.write_text(long + "\n")
    with pytest.raises(SystemExit):
        rl(config, out=f"{config['out']}_none")
    assert "none of 1 prompts can be asked; the first: text 'woman woman" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"reward_config": {"rubric": {"rewards": {"a": reward("asking")}}}},
            "reward 'a' asks for the column 'solution', which the data set does not have",
        ),
        (
            {"reward_config": {"rubric": {"rewards": {"a": reward("Unavailable")}}}},
            "reward 'a' needs a package that is not there",
        ),
        ({"num_generations": 1}, "num_generations is 1; it must be at least 2"),
        (
            {"answering": {**WRITE, "init_args": {"temperature": 0.0}}},
            "temperature is 0, so that all completions of a prompt would be alike",
        ),
        ({"reward_config": {"right": "truth"}}, "right 'truth' is no reward of the rubric"),
        (
            {
                "reward_config": {
                    "rubric": {"rewards": {"a": reward("Letters"), "b": reward("Always")}},
                    "keep": {},
                }
            },
            "the rubric has a, b; name one of them as right",
        ),
        (
            {
                "answering": {
                    "class_path": "train.rollouts.answering.Write",
                    "init_args": {
                        "sampler": {
                            "num_inference_steps": 3,
                            "temperature": 1.0,
                            "reproduce": "llada",
                            "published_defects": True,
                        }
                    },
                }
            },
            "set full_vocabulary of the estimator",
        ),
        (
            {
                "answering": {
                    "class_path": "train.rollouts.answering.Write",
                    "init_args": {
                        "sampler": {"num_inference_steps": 3, "temperature": 1.0, "remask": 0.1}
                    },
                },
                "estimator": {"class_path": "mmdlm.core.likelihood.trajectory.TrajectoryReplay"},
            },
            "remask is 0.1, but TrajectoryReplay replays tokens that stay",
        ),
        (
            {
                "answering": {
                    "class_path": "train.rollouts.answering.Write",
                    "init_args": {
                        "sampler": {"num_inference_steps": 3, "temperature": 1.0, "top_p": 0.9}
                    },
                },
                "estimator": {
                    "class_path": "mmdlm.core.likelihood.trajectory.TrajectoryReplay",
                    "init_args": {"with_order": True},
                },
            },
            "with_order is exact only with top_p None, but the sampler has 0.9",
        ),
        (
            {
                "estimator": {
                    "class_path": "mmdlm.core.likelihood.structured.StructuredNoise",
                    "init_args": {"full_vocabulary": True},
                }
            },
            "full_vocabulary of the estimator counts ids that the sampler does not draw",
        ),
        ({"training": {"sample_steps": 2}}, "log_completions_every shows what a policy does"),
        ({"budget": {"tokens": 0}}, "budget: tokens is 0"),
        ({"model": {"start_from": "nowhere"}}, "no model 'nowhere'"),
    ],
)
def test_mistakes_are_told_before_any_rollout(
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(SystemExit):
        rl(config, **changes)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (Path(config["out"]) / "completions").exists()


# ---- prompts ------------------------------------------------------------------------------------


def test_prompts_of_parquet_are_those_of_lines(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    lines, parquet = (
        Lines(str(tmp_path / f"a.{kind}")).problems() for kind in ("jsonl", "parquet")
    )
    assert [one.prompt.text for one in lines] == ["a", "b"]
    assert [one.columns for one in lines] == [{"answer": "1"}, {"answer": "2"}]
    assert [(one.prompt, one.columns) for one in parquet] == [
        (one.prompt, one.columns) for one in lines
    ]


def test_prompts_are_texts_or_one_message_and_columns_are_those_that_all_rows_have(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    said = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": said, "a": 1, "b": 2, "image": "x.png"},
        {"prompt": "ho", "a": 3, "image": []},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = Lines(str(path), images="image").problems()
    assert (first.prompt.text, second.prompt.text) == ("hi", "ho")
    assert first.columns == {"a": 1, "image": "x.png", "images": [str(tmp_path / "x.png")]}
    assert second.columns["images"] == []
    for name in ("../x.png", "/etc/passwd"):
        path.write_text(json.dumps({"prompt": "hi", "image": name}) + "\n")
        with pytest.raises(
            ValueError, match=f"line 1: its image '{name}' is outside of the folder"
        ):
            Lines(str(path), images="image").problems()
        Lines(str(path), images="image", allow_outside=True).problems()
    path.write_text(json.dumps({"prompt": [*said, *said]}) + "\n")
    with pytest.raises(ValueError, match="give it a text, or one message of the user"):
        Lines(str(path)).problems()


def test_names_of_shards_leave_out_what_is_held_out(tmp_path: Path) -> None:
    samples = [
        {"__key__": f"{n}", "txt": name.encode(), "json": json.dumps({"held_out": n == 1}).encode()}
        for n, name in enumerate(["dog", "cat", "sun"])
    ]
    write_shard(tmp_path / "0.tar", samples)
    urls = str(tmp_path / "0.tar")
    assert [one.columns["name"] for one in Names(urls).problems()] == ["dog", "sun"]
    assert [one.prompt.text for one in Names(urls, held_out=True).problems()] == ["cat"]
    assert len(Names(urls, held_out=None).problems()) == 3
    matching = Names(urls, held_out=None, matching="^(c|d)").problems()
    assert sorted(one.prompt.text for one in matching) == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"matching '\(' is no regular expression"):
        Names(urls, matching="(")
    with pytest.raises(ValueError, match="has no field 'text'"):
        Names(urls, field="text").problems()


def test_names_are_asked_for_in_other_orders_of_their_words(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [{"__key__": "0", "txt": b"one two three four"}])
    names = Names(str(tmp_path / "0.tar"), orders=5)
    asked = [one.prompt.text for one in names.problems()]
    assert 2 <= len(set(asked)) == len(asked) <= 5
    assert all(sorted(one.split()) == ["four", "one", "three", "two"] for one in asked)
    assert {one.columns["name"] for one in names.problems()} == {"one two three four"}
    assert asked == [one.prompt.text for one in names.problems()]
    assert asked != [one.prompt.text for one in replace(names, seed=1).problems()]
    with pytest.raises(ValueError, match="orders must not be negative, got -1"):
        replace(names, orders=-1)


def test_made_problems_are_of_the_training_split() -> None:
    grids = set(split_grids("held_out"))
    assert not grids & {one.columns["solution"] for one in Sudoku(count=50).problems()}
    for one in Countdown(count=20).problems():
        assert not CountdownProblem(tuple(one.columns["numbers"]), one.columns["target"]).held_out
