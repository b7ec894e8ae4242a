"""The weighted sum, and rewards that misbehave."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import pytest

from mmdlm.rl.reward import RewardUnavailable, Rubric, needs, text_of
from mmdlm.rl.rewards.answers.countdown import Countdown
from mmdlm.rl.rewards.answers.form import Tagged


def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [float(len(one)) for one in completions]


def is_even(completions: list[str], **columns: Any) -> list[float | None]:
    return [1.0 if len(one) % 2 == 0 else None for one in completions]


async def slow(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    await asyncio.sleep(0.01)
    return [0.5] * len(completions)


def given(scores: Any) -> Callable[..., Any]:
    """A reward that returns, or raises, the same whatever happens."""

    def reward(completions: list[str], **columns: Any) -> Any:
        if isinstance(scores, Exception):
            raise scores
        return scores

    return reward


def score(rubric: Rubric, texts: list[str], **columns: Any) -> Any:
    return rubric(["p"] * len(texts), texts, columns=columns)


def test_the_total_is_the_weighted_sum_and_the_parts_are_kept() -> None:
    rubric = Rubric({"length": length, "slow": slow}, {"length": 2.0})
    found = score(rubric, ["ab", "abc"])
    assert found.total.tolist() == [4.5, 6.5]
    assert found.rewards["length"].tolist() == [2, 3]
    assert found.rewards["slow"].tolist() == [0.5, 0.5]
    assert found.weights == {"length": 2.0, "slow": 1.0}
    assert not found.skipped


def test_what_does_not_apply_does_not_count() -> None:
    found = score(Rubric({"even": is_even, "length": length}), ["ab", "abc"])
    assert found.total.tolist() == [3, 3]
    found = score(Rubric({"even": is_even}), ["ab", "abc"])
    assert found.scored.tolist() == [True, False]
    assert math.isnan(found.total[1])
    assert not found.skipped


@pytest.mark.parametrize(
    "scores, wrong, reason",
    [
        (ZeroDivisionError("division by zero"), 2, "raised ZeroDivisionError: division by zero"),
        ([1.0], 2, "returned 1 scores for 2 completions"),
        (3.0, 2, "returned float"),
        (None, 2, "returned NoneType"),
        ([1.0, math.nan], 1, "completion 1 the score nan"),
        ([math.inf, 1.0], 1, "completion 0 the score inf"),
        (["good", 1.0], 1, "completion 0 the score 'good'"),
    ],
)
def test_a_reward_that_misbehaves_is_a_counted_skip_or_one_sentence(
    scores: Any, wrong: int, reason: str
) -> None:
    rewards = {"bad": given(scores), "length": length}
    found = score(Rubric(rewards), ["ab", "abc"])
    assert found.skipped["bad"].count == wrong
    assert reason in found.skipped["bad"].reason
    assert int((~found.scored).sum()) == wrong
    assert found.rewards["length"].tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"reward 'bad'") as error:
        score(Rubric(rewards, on_error="raise"), ["ab", "abc"])
    assert "\n" not in str(error.value)


def test_an_async_reward_that_raises_is_skipped_too() -> None:
    async def bad(completions: list[str], **columns: Any) -> list[float]:
        raise RuntimeError("no answer from the judge")

    found = score(Rubric({"bad": bad, "slow": slow}), ["a"])
    assert "no answer from the judge" in found.skipped["bad"].reason
    assert found.rewards["slow"].tolist() == [0.5]


def test_async_rewards_work_inside_a_loop() -> None:
    async def main() -> Any:
        return score(Rubric({"slow": slow}), ["a", "b"])

    assert asyncio.run(main()).total.tolist() == [0.5, 0.5]


def test_what_cannot_work_is_never_a_skip() -> None:
    async def later(completions: list[str], **columns: Any) -> list[float]:
        raise RewardUnavailable("install it")

    for reward in (given(RewardUnavailable("install it")), later):
        with pytest.raises(RewardUnavailable, match="install it"):
            score(Rubric({"absent": reward}), ["a"])


def test_rewards_are_prepared_before_the_run() -> None:
    class Heavy:
        prepared = False

        def prepare(self) -> None:
            self.prepared = True

        def __call__(self, completions: list[str], **columns: Any) -> list[float]:
            return [float(self.prepared)] * len(completions)

    rubric = Rubric({"heavy": Heavy(), "length": length})
    rubric.prepare()
    assert score(rubric, ["a"]).rewards["heavy"].tolist() == [1]


def test_columns_that_are_missing_are_named_before_the_run() -> None:
    rubric = Rubric({"countdown": Countdown(), "length": length})
    assert needs(rubric.rewards["countdown"]) == ("numbers", "target")
    with pytest.raises(ValueError, match=r"'countdown' asks for the column 'numbers'.*has target"):
        rubric.check_columns({"target"})
    rubric.check_columns({"target", "numbers"})


def test_rewards_get_what_they_have_a_parameter_for() -> None:
    def strict(completions: list[str], answer: list[str], hint: list[str] | None = None) -> Any:
        return [float(one == right) for one, right in zip(completions, answer, strict=True)]

    found = score(Rubric({"strict": strict}), ["a", "b"], answer=["a", "x"], other=[1, 2])
    assert found.total.tolist() == [1, 0]


def test_what_rewards_log_is_kept() -> None:
    def noting(completions: list[str], log_extra: Any, log_metric: Any, **columns: Any) -> Any:
        log_extra("seen", [one.upper() for one in completions])
        log_metric("calls", 1)
        log_metric("calls", 3)
        return [0.0] * len(completions)

    found = score(Rubric({"noting": noting}), ["a", "b"])
    assert found.extras == {"seen": ["A", "B"]}
    assert found.metrics == {"calls": 2}


def test_text_of_messages() -> None:
    messages = [{"role": "assistant", "content": "a"}]
    assert text_of("a") == text_of(messages) == text_of(messages[0]) == "a"
    with pytest.raises(ValueError, match="has no text"):
        text_of(3)
    found = score(Rubric({"form": Tagged()}), [[{"role": "assistant", "content": "x"}]])
    assert found.total.tolist() == [0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rewards": {}}, "no rewards"),
        ({"rewards": {"a": 3}}, "cannot be called"),
        ({"rewards": {"a": length}, "weights": {"b": 1.0}}, "'b'"),
        ({"rewards": {"a": length}, "weights": {"a": math.nan}}, "finite"),
        ({"rewards": {"a": length}, "on_error": "ignore"}, "neither"),
    ],
)
def test_bad_rubrics(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rubric(**arguments)


def test_prompts_and_columns_pair_up() -> None:
    with pytest.raises(ValueError, match="2 completions but 1 values of 'prompts'"):
        Rubric({"a": length})(["p"], ["a", "b"])
    with pytest.raises(ValueError, match="'answer'"):
        score(Rubric({"a": length}), ["a", "b"], answer=["x"])


def test_yaml_names_rewards_by_class_path(tmp_path: Path) -> None:
    config = tmp_path / "rubric.yaml"
    config.write_text(
        """
rubric:
  rewards:
    countdown:
      class_path: mmdlm.rl.rewards.answers.countdown.Countdown
      init_args: {wrong: 0.2}
    form: {class_path: mmdlm.rl.rewards.answers.form.Tagged}
    mine: mmdlm.rl.rewards.answers.d1.sudoku
  weights: {countdown: 2.0}
"""
    )
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--rubric", type=Rubric)
    parsed = parser.instantiate(parser.parse_args(["--config", str(config)])).rubric
    assert parsed.rewards["countdown"] == Countdown(wrong=0.2)
    assert callable(parsed.rewards["mine"])
    assert parsed.rewards["form"] == Tagged()
    assert parsed.weights == {"countdown": 2.0}


def test_a_column_must_not_take_the_place_of_what_rewards_are_given() -> None:
    rubric = Rubric({"long": lambda completions, **columns: [float(len(c)) for c in completions]})
    with pytest.raises(ValueError, match="has a column 'completions', under which rewards are"):
        rubric(["p"], ["a long answer"], columns={"completions": ["x"]})


def test_rewards_are_given_what_trl_gives_them() -> None:
    """The signature of TRL's documentation: ids, and the state of the trainer."""
    seen = {}

    def reward(prompts, completions, completion_ids, trainer_state, **columns):
        seen.update(ids=completion_ids, step=trainer_state.global_step, said=completions)
        return [float(len(ids)) for ids in completion_ids]

    said = [[{"role": "assistant", "content": "yes"}]]
    state = SimpleNamespace(global_step=7)
    found = Rubric({"length": reward})(
        ["p"], said, completion_ids=[[3, 4]], trainer_state=state, columns={"answer": ["yes"]}
    )
    assert found.total.tolist() == [2.0]
    assert seen == {"ids": [[3, 4]], "step": 7, "said": said}
    Rubric({"length": reward}).check_columns({"answer"})


def test_a_client_of_an_async_reward_lives_from_batch_to_batch() -> None:
    class Client:
        loop: asyncio.AbstractEventLoop | None = None

        async def __call__(self, completions, **columns):
            self.loop = self.loop or asyncio.get_running_loop()
            await asyncio.wait_for(self.loop.run_in_executor(None, len, "ab"), 5)
            return [1.0] * len(completions)

    rubric = Rubric({"client": Client()}, on_error="raise")
    for _ in range(2):
        assert rubric(["p"], ["c"]).total.tolist() == [1.0]


class Obstinate:
    def __float__(self) -> float:
        raise RuntimeError("no")


@pytest.mark.parametrize("score", [10**400, Obstinate()])
def test_a_score_that_is_no_float_is_skipped(score) -> None:
    found = Rubric({"odd": lambda completions, **columns: [score, 1.0]})(["p"] * 2, ["a", "b"])
    assert found.skipped["odd"].count == 1
    assert found.scored.tolist() == [False, True]


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError()])
def test_a_reward_that_tries_to_leave_is_skipped(error) -> None:
    def leaving(completions, **columns):
        raise error

    async def later(completions, **columns):
        raise error

    for reward in (leaving, later) if isinstance(error, asyncio.CancelledError) else (leaving,):
        assert Rubric({"gone": reward})(["p"], ["c"]).skipped["gone"].count == 1
